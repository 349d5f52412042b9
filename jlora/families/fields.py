"""Reads config.json's fields, each checked where it is read, and all problems reported together."""

import re
from typing import Any

from jlora.errors import UserError, describe_faults
from jlora.families import kinds

# Fields of transformers' configs that do not change the logits of a causal language model: documentation, training and
# generation settings, and dropout, which jlora has only in adapters.
HARMLESS = frozenset(
    (
        *("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "return_dict", "use_cache"),
        *("output_attentions", "output_hidden_states", "chunk_size_feed_forward", "pretraining_tp"),
        *("initializer_range", "is_encoder_decoder", "is_decoder", "cross_attention_hidden_size", "problem_type"),
        *("bos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "task_specific_params"),
        *("id2label", "label2id", "num_labels", "attention_dropout", "hidden_dropout", "classifier_dropout"),
        *("residual_dropout", "embedding_dropout", "eod_token_id"),
        *("attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_activation", "summary_first_dropout"),
        *("summary_proj_to_labels", "summary_type", "summary_use_proj"),
        *("mamba_chunk_size", "num_logits_to_keep", "z_loss_coefficient", "use_mamba_kernels"),
        *("mamba_ssm_cache_dtype", "rescale_prenorm_residual", "residual_in_fp32"),
        *("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),
    )
)


class Fields:
    """A config.json being read: the fields asked for, those missing, and every problem found on the way.

    A field is checked only when it is read: one that a family does not read may hold anything.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.seen: set[str] = set()
        self.missing: dict[str, None] = {}  # in order, each once
        self.wrong: dict[str, None] = {}
        self.problems: list[str] = []
        self.parts: dict[str, Fields] = {}

    @property
    def text(self) -> "Fields":
        """The language model's fields: those of an object inside, in a model of several parts."""
        return next(iter(self.parts.values()), self)

    def inside(self, name: str, config: dict[str, Any]) -> "Fields":
        """The fields of an object inside; what is found there is reported here, as NAME.field."""
        self.parts[name] = Fields(config)
        return self.parts[name]

    def replaced(self, **values: Any) -> "Fields":
        """The same fields with other values; what is found is recorded in this object too."""
        other = Fields(self.config | values)
        other.seen, other.missing, other.wrong, other.problems = self.seen, self.missing, self.wrong, self.problems
        other.parts = self.parts
        return other

    def get(self, name: str, default: Any = None, kind: kinds.Kind | None = None) -> Any:
        """The field's value; `default` if it is absent, null, or of the wrong kind, which is recorded.

        Args:
            kind: needed for fields that `kinds.FIELDS` lacks, which may hold anything without it.
        """
        self.seen.add(name)
        return self.of_kind(kind or kinds.FIELDS.get(name), name, self.config.get(name), default)

    def of_kind(self, kind: kinds.Kind | None, name: str, value: Any, default: Any = None) -> Any:
        """As `get`, for a value that was found elsewhere."""
        wrong = kinds.wrong(kind, name, value)
        self.wrong |= dict.fromkeys(wrong)
        return default if value is None or wrong else value

    def require(self, name: str, kind: kinds.Kind | None = None) -> int:
        """The field's value; if it is absent, that is recorded, and 1 stands in until `finish`."""
        if self.config.get(name) is None:
            self.missing[name] = None
        return self.get(name, 1, kind)

    def rope(self) -> dict[str, Any]:
        """The rotary parameters: `rope_scaling` (transformers 4) unless it is empty, else `rope_parameters`.

        The latter are transformers 5's, which has the same preference.
        """
        own = self.get("rope_parameters", {})
        return self.get("rope_scaling") or own

    def ropes(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The rotary parameters of layers without a window, to which `rope_scaling` belongs, and with one."""
        nested = self.get("rope_parameters", {})
        nested = nested if {"full_attention", "sliding_attention"} & set(nested) else {}
        if wrong := sorted(name for name, value in nested.items() if not isinstance(value, dict | None)):
            self.problems.append(f"rope_parameters: {', '.join(wrong)}: expected objects")
            nested = {}
        full = (nested.get("full_attention") or {}) | (self.get("rope_scaling") or {})
        return full, nested.get("sliding_attention") or {}

    def only(self, name: str, *supported: Any) -> None:
        """Records a problem if the field has a value that is not supported; an absent field is fine."""
        value = self.get(name)
        if value is not None and value not in supported:
            self.problems.append(
                f"{name} {value!r} is not supported (supported: {', '.join(map(repr, supported)) or 'null'})"
            )

    def finish(self) -> None:
        """Raises ValueError if anything is wrong, with a list of everything."""
        for name, part in self.parts.items():
            self.missing |= {f"{name}.{field}": None for field in part.missing}
            self.wrong |= {f"{name}.{line}": None for line in part.wrong}
            self.problems += [f"{name}.{line}" if part.names(line) else f"{name}: {line}" for line in part.problems]
        if self.missing and not self.wrong:
            raise UserError(f"config.json lacks {', '.join(self.missing)}")
        # Other problems are reported only if no value is missing or wrong: stand-ins may have caused them.
        if problems := [f"{name} is missing" for name in self.missing] + [*self.wrong] or self.problems:
            raise UserError(describe_faults("config.json", problems))

    def names(self, line: str) -> bool:
        """Whether a line for the message begins with the name of one of the fields."""
        return re.split(r"[^\w]", line, maxsplit=1)[0] in self.seen
