"""Everything that a decoder's computation depends on, in one frozen dataclass for every family's config.json."""

import dataclasses
import json
import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from jlora import tree
from jlora.errors import UserError, describe_faults
from jlora.models import kinds


class Layer(NamedTuple):
    """The settings in which a decoder layer may differ from its neighbours.

    Attributes:
        window: keys this many or more positions back are not seen; None: all are seen.
        rope: the index in `ModelConfig.ropes` of the rotation of its queries and keys; None: they are not rotated.
        experts: whether its MLP is a mixture of experts.
    """

    window: int | None = None
    rope: int | None = 0
    experts: bool = False


class Names(NamedTuple):
    """The paths of a model's parts in its tree, as Hugging Face names them."""

    stack: str = "layers"
    embedding: str = "embed_tokens"
    positions: str | None = None
    norm: str = "norm"
    head: str = "lm_head"
    attention: str = "self_attn"
    queries_keys_values: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    output: str = "o_proj"
    mlp_up: tuple[str, ...] = ("gate_proj", "up_proj")
    mlp_down: str = "down_proj"
    # (norm before, norm after) of attention and of the MLP
    attention_norms: tuple[str | None, str | None] = ("input_layernorm", None)
    mlp_norms: tuple[str | None, str | None] = ("post_attention_layernorm", None)


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions: the fields of `rope_parameters`, and what transformers derives from other fields.

    Attributes:
        dim: how many values of a head are rotated.
        attention_factor: factor of cos and sin.
        max_position_embeddings: the length beyond which "dynamic" stretches.
    """

    dim: int
    rope_theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def without_idle_lengths(self) -> "Rope":
        """The same rotation, without the lengths that its type does not use."""
        idle = () if self.rope_type in ("llama3", "yarn", "longrope") else ("original_max_position_embeddings",)
        idle += () if self.rope_type == "dynamic" else ("max_position_embeddings",)
        return dataclasses.replace(self, **dict.fromkeys(idle, 0))


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts: every token goes to the `top_k` experts that the router finds likeliest.

    Attributes:
        count: number of experts.
        intermediate_size: inner width of one expert.
        normalize: whether the chosen experts' probabilities are scaled to a sum of 1.
    """

    count: int
    top_k: int
    intermediate_size: int
    normalize: bool


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder's settings.

    Attributes:
        layers: one entry for each layer.
        hidden_act: the MLP's activation, one of `jlora.models.layers.ACTIVATIONS`.
        gated: whether the MLP is down(act(gate) · up), not down(act(up)).
        norm: "rms", "rms_wide" (scaled before rounding), "rms_plus_one" (scaled by 1 + weight) or "layer".
        qk_norm: the norm of queries and keys: None, "head" (each head by itself) or "all" (all heads together).
        qkv_by_head: whether a fused projection is laid out head by head, each with its query, key and value.
        parallel: whether attention and MLP read the same input.
        attention_scale: factor of the scores; `inverse_layer_scale` divides it by the layer's number, from 1.
        attention_softcap, final_softcap: s → cap · tanh(s / cap) of scores and logits.
        embedding_scale, residual_scale: factors of the embeddings and of what a block adds.
        logits_divisor: what logits are divided by.
        source: the whole config.json, to write it back.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    layers: tuple[Layer, ...]
    ropes: tuple[Rope, ...] = ()
    names: Names = Names()
    hidden_act: str = "silu"
    gated: bool = True
    norm: str = "rms"
    qk_norm: str | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qkv_by_head: bool = False
    parallel: bool = False
    attention_scale: float = 1.0
    inverse_layer_scale: bool = False
    attention_softcap: float | None = None
    final_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_divisor: float = 1.0
    experts: Experts | None = None
    eos_token_ids: tuple[int, ...] = ()
    source: str = dataclasses.field(default="{}", repr=False)

    def to_hf(self) -> dict[str, Any]:
        """The config.json that this was made from, with every key."""
        return json.loads(self.source)

    def with_field(self, name: str, value: Any) -> "ModelConfig":
        """The config with another value of a field that has the same name in config.json, there too."""
        written = json.dumps(self.to_hf() | {name: value}, sort_keys=True)
        return dataclasses.replace(self, source=written, **{name: value})

    def positions_before(self, new_tokens: int) -> int | None:
        """The longest text that this many new tokens can follow (the last is never read); None: any length."""
        return None if self.names.positions is None else self.max_position_embeddings - new_tokens + 1

    @property
    def longest_text(self) -> int:
        """The longest text, in tokens, that the model's positions are made for, with rotary scaling."""
        scaled = [int(rope.factor * rope.original_max_position_embeddings) for rope in self.ropes]
        return max([self.max_position_embeddings, *scaled])

    def warn_beyond(self, tokens: int, what: str) -> None:
        """Warns if texts are longer than the model's positions are made for.

        Args:
            tokens: length of the longest text.
            what: what the warning calls the texts.
        """
        if self.ropes and tokens > self.longest_text:
            warnings.warn(
                f"{what}: up to {tokens} tokens, but the model was made for texts of up to {self.longest_text} "
                "(max_position_embeddings and rotary scaling in config.json): what it makes of later ones is in doubt",
                stacklevel=3,
            )

    @property
    def stacks(self) -> tuple[range, ...]:
        """The layers of each stack: those with the same structure share one."""
        return tuple(tree.stack_ranges([layer.experts for layer in self.layers]))

    def require_same(self, other: "ModelConfig", ours: str, theirs: str) -> None:
        """Raises UserError unless both compute the same from the same weights.

        End-of-text tokens, the length of texts in training, and whatever else config.json and generation_config.json
        say may differ.

        Args:
            ours, theirs: what the message calls the two.

        Raises:
            ValueError: settings of the computation differ; all are listed.
        """
        pair = (self._computation(), other._computation())
        if lines := [line for name in pair[0] for line in _differences(name, *(values[name] for values in pair))]:
            raise UserError(f"{ours} and {theirs} are not models of one architecture:\n  " + "\n  ".join(lines))

    def _computation(self) -> dict[str, Any]:
        """The fields that determine what is computed from the weights."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["ropes"] = tuple(rope.without_idle_lengths() for rope in self.ropes)
        values["max_position_embeddings"] *= self.names.positions is not None
        return {name: value for name, value in values.items() if name not in ("source", "eos_token_ids")}


def _differences(name: str, one: Any, other: Any) -> list[str]:
    """A line for each difference, entry by entry if the field is a tuple."""
    if type(one) is type(other) is tuple and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [line for index, pair in pairs for line in _differences(f"{name}[{index}]", *pair)]
    return [] if one == other else [f"{name}: {one!r} and {other!r}"]


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

    def replaced(self, **values: Any) -> "Fields":
        """The same fields with other values; what is found is recorded in this object too."""
        other = Fields(self.config | values)
        other.seen, other.missing, other.wrong, other.problems = self.seen, self.missing, self.wrong, self.problems
        return other

    def get(self, name: str, default: Any = None) -> Any:
        """The field's value; `default` if it is absent, null, or of the wrong kind, which is recorded."""
        self.seen.add(name)
        return self.of_kind(kinds.FIELDS, name, self.config.get(name), default)

    def of_kind(
        self, kind: Mapping[str, kinds.Kind], name: str, value: Any, default: Any = None, *, what: str = ""
    ) -> Any:
        """As `get`, for a value that was found elsewhere; `what` says where."""
        wrong = kinds.wrong(kind, name, value, what)
        self.wrong |= dict.fromkeys(wrong)
        return default if value is None or wrong else value

    def require(self, name: str) -> int:
        """The field's value; if it is absent, that is recorded, and 1 stands in until `finish`."""
        if self.config.get(name) is None:
            self.missing[name] = None
        return self.get(name, 1)

    def rope(self) -> dict[str, Any]:
        """The rotary parameters: `rope_scaling` (transformers 4) unless it is empty, else `rope_parameters`
        (transformers 5, which has the same preference).
        """
        own = self.get("rope_parameters", {})
        return self.get("rope_scaling") or own

    def only(self, name: str, *supported: Any) -> None:
        """Records a problem if the field has a value that is not supported; an absent field is fine."""
        value = self.get(name)
        if value is not None and value not in supported:
            self.problems.append(
                f"{name} {value!r} is not supported (supported: {', '.join(map(repr, supported)) or 'null'})"
            )

    def finish(self) -> None:
        """Raises ValueError if anything is wrong, with a list of everything."""
        if self.missing and not self.wrong:
            raise UserError(f"config.json lacks {', '.join(self.missing)}")
        # Other problems are reported only if no value is missing or wrong: stand-ins may have caused them.
        if problems := [f"{name} is missing" for name in self.missing] + [*self.wrong] or self.problems:
            raise UserError(describe_faults("config.json", problems))


# rope_type → (needed, optional) parameters
ROPE_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (("factor",), ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")),
    "longrope": (("short_factor", "long_factor"), ("factor", "attention_factor")),
}


def read_rope(
    fields: Fields, parameters: dict[str, Any], *, theta: float, head_dim: int, partial: float | None = None
) -> Rope:
    """The rotary positions that `rope_parameters` (transformers 5) or `rope_scaling` (4) describe.

    Args:
        parameters: the value of that field.
        theta: the base, unless `parameters` give it.
        partial: the share of a head that is rotated, unless `parameters` give it; None: the family rotates whole heads.
    """

    def read(name: str, default: Any = None) -> Any:
        return fields.of_kind(kinds.ROTARY, name, parameters.get(name), default, what="rotary parameter ")

    rope_type = read("rope_type", read("type", "default") if parameters.get("rope_type") is None else "default")
    longest = fields.get("max_position_embeddings", 2048)
    original = fields.get("original_max_position_embeddings", read("original_max_position_embeddings", longest))
    theta = float(read("rope_theta", theta))
    if partial is not None:
        dim = int(head_dim * read("partial_rotary_factor", partial))
    elif rope_type == "default":  # transformers then rotates whole heads, whatever the file says
        dim = head_dim
    else:
        dim = int(head_dim * read("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0)))
        if dim != head_dim:
            fields.problems.append(
                f"rope_type {rope_type!r} with a partial_rotary_factor is not supported in this family, which rotates "
                "whole heads (nor does transformers compute it)"
            )
    if not 0 < dim <= head_dim or dim % 2:
        fields.problems.append(f"{dim} of a head's {head_dim} values are rotated; expected an even number of them")
    if rope_type not in ROPE_TYPES:
        fields.problems.append(f"rope_type {rope_type!r} is not supported (supported: {', '.join(ROPE_TYPES)})")
        return Rope(dim)
    needed, optional = ROPE_TYPES[rope_type]
    found = {name: value for name in (*needed, *optional) if (value := read(name)) is not None}
    fields.problems += [f"rope_type {rope_type!r} needs {name!r}" for name in needed if name not in found]
    if rope_type == "longrope":
        found |= {name: tuple(found.get(name, ())) for name in needed}
        found.setdefault("factor", longest / original)
        fields.problems += [
            f"rope_type 'longrope' needs {dim // 2} numbers in {name!r}, found {len(found[name])}"
            for name in needed
            if len(found[name]) != dim // 2
        ]
    found.setdefault("attention_factor", _attention_factor(rope_type, found, original))
    names = {field.name for field in dataclasses.fields(Rope)}
    return Rope(
        dim=dim,
        rope_theta=theta,
        rope_type=rope_type,
        original_max_position_embeddings=original,
        max_position_embeddings=longest,
        **{name: value for name, value in found.items() if name in names},
    )


def _attention_factor(rope_type: str, parameters: dict[str, Any], original: int) -> float:
    """What YaRN (Peng et al. 2023) and LongRoPE (Ding et al. 2024) multiply cos and sin by."""
    factor = parameters.get("factor", 1.0)
    if factor <= 1:
        return 1.0
    if rope_type == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    if rope_type == "yarn":
        mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
        if mscale and all_dim:
            return (0.1 * mscale * math.log(factor) + 1) / (0.1 * all_dim * math.log(factor) + 1)
        return 0.1 * math.log(factor) + 1
    return 1.0
