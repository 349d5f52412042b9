"""How llama.cpp's files hold a family: what families say about it, and the pieces that several of them share."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jlora.errors import UserError
from jlora.families.layouts import Joined, Layout

if TYPE_CHECKING:
    from jlora.families.family import Family
    from jlora.models.config import ModelConfig

# Keys below the architecture's name that do not change what a causal language model computes.
HARMLESS = frozenset(("vocab_size", "tensor_data_layout", "pooling_type", "rope.scaling.finetuned"))
# GGUF's name for per-dimension divisors of the rotary frequencies, and the divisor of those that rotate nothing.
FREQUENCIES, IDLE = "rope_freqs.weight", 1e30
Config = dict[str, Any]


class Metadata:
    """A file's metadata, with a record of the keys that were read and the problems that were found.

    Keys are given without the architecture's name: "block_count" means "llama.block_count".
    """

    def __init__(
        self,
        path: Path,
        fields: Mapping[str, Any],
        tensors: Mapping[str, tuple[int, ...]],
        values: Callable[[str], np.ndarray],
    ) -> None:
        self.path, self.fields, self.tensors, self.values = path, fields, tensors, values
        self.architecture = str(fields.get("general.architecture"))
        self.seen: set[str] = set()
        self.problems: list[str] = []

    def name(self, key: str) -> str:
        """The full key."""
        return f"{self.architecture}.{key}"

    def get(self, key: str, default: Any = None) -> Any:
        """The value; `default` if there is none."""
        self.seen.add(key)
        value = self.fields.get(self.name(key), default)
        return shortest(value) if isinstance(value, float) else value

    def number(self, key: str, default: Any = None) -> Any:
        """The value, or that of a list with one value per layer; notes a problem if these differ."""
        value = self.get(key, default)
        if isinstance(value, list) and len(set(value)) != 1:
            self.problems.append(f"{self.name(key)} differs from layer to layer: {value}")
        return value[0] if isinstance(value, list) and value else value

    def require(self, key: str) -> Any:
        """The value; if it is missing or 0, notes a problem and returns 1, so that reading can go on to `finish`."""
        value = self.number(key)
        if value is None:
            self.problems.append(f"no metadata {self.name(key)}")
        elif value == 0 and not isinstance(value, bool):
            self.problems.append(f"{self.name(key)} is 0")
        return value if value or isinstance(value, bool) else 1

    def only(self, key: str, *supported: Any) -> None:
        """Notes a problem if there is a value that is not supported."""
        value = self.number(key)
        if value is not None and value not in supported:
            expected = " or ".join(map(str, supported))
            self.problems.append(f"{self.name(key)} is {value}; jlora computes only {expected}")

    def share_of_frequencies(self) -> float:
        """The share of the rotary frequencies that are not divided by so much that nothing is rotated."""
        if FREQUENCIES not in self.tensors:
            self.problems.append(f"no tensor {FREQUENCIES}")
            return 1.0
        divisors = self.values(FREQUENCIES)
        kept = int(np.sum(divisors == 1))
        if np.any(divisors[:kept] != 1) or np.any(divisors[kept:] < IDLE):
            self.problems.append(f"{FREQUENCIES} does not keep the first frequencies and stop the others")
        return kept / divisors.size

    def finish(self) -> None:
        """Raises ValueError with all problems: those noted, and keys that were never read."""
        prefix = self.name("")
        known = self.seen | HARMLESS
        for name, value in self.fields.items():
            key = name.removeprefix(prefix)
            # Converters write zeros for what a model does not have.
            if name.startswith(prefix) and key not in known and value not in (0, None, ""):
                self.problems.append(f"{name} is {value!r}, which is not supported")
        if self.problems:
            raise UserError(f"{self.path} cannot be read as a model:\n  " + "\n  ".join(self.problems))


def heads(metadata: Metadata, config: Config) -> Config:
    """The size of a head, and the number of heads of keys and values."""
    count = config["num_attention_heads"]
    usual = metadata.number("rope.dimension_count", config["hidden_size"] // count)
    head_dim = metadata.number("attention.key_length", usual)
    metadata.only("attention.value_length", head_dim)
    groups = metadata.number("attention.head_count_kv", count)
    return {"head_dim": head_dim, "num_key_value_heads": groups}


def windows(metadata: Metadata, config: Config, *, window: int | None, period: int) -> Config:
    """Which layers have a window, and how long it is.

    Args:
        window: its length, if the file does not say; None: then there is none.
        period: one layer in this many has no window, unless the file says which.
    """
    window = metadata.number("attention.sliding_window", window)
    pattern = metadata.get("attention.sliding_window_pattern", period)
    count = config["num_hidden_layers"]
    sliding = pattern if isinstance(pattern, list) else [i % pattern < pattern - 1 for i in range(count)]
    return {
        **({"sliding_window": window} if window else {}),
        "layer_types": ["sliding_attention" if window and slides else "full_attention" for slides in sliding],
    }


def require_even_heads(metadata: Metadata, width: int, heads: int) -> None:
    """Notes a problem if the heads do not divide the width evenly."""
    for key in ("attention.key_length", "attention.value_length"):
        metadata.only(key, width // heads)


# config.json's name → GGUF's.
SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
DECODER = {**SIZES, "rms_norm_eps": "attention.layer_norm_rms_epsilon"}
SOFT_CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
WINDOW = {"sliding_window": "attention.sliding_window"}
ROUTED = {"num_experts_per_tok": "expert_used_count"}
SILU = {"hidden_act": "silu"}
# config.json's name → the tensor that exists if the field is true.
ATTENTION_BIAS = {"attention_bias": "blk.0.attn_q.bias"}
BIASES = {**ATTENTION_BIAS, "mlp_bias": "blk.0.ffn_gate.bias"}
# GGUF's name of a layer's module → the Hub's.
QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    **{f"ffn_{x}_exps": f"mlp.experts.{{expert}}.{x}_proj" for x in ("gate", "up", "down")},
}


class Reading(NamedTuple):
    """How a file's metadata becomes a config.json.

    Attributes:
        required, optional: config.json's name → GGUF's; an optional one that is absent or 0 is left out.
        more: computes the other fields that follow from the metadata.
        constants: fields that GGUF does not have, because llama.cpp always computes them so.
        biases: config.json's name → a tensor that exists if the field is true.
        theta, share: config.json's names of the rotary base (None: no rotary positions) and of the share of a head that
            is rotated (None: always all of it).
        scaling: (metadata) → what `rope_scaling` has besides, in files that scale rotations.
        mark: a key that is there and not 0 in this family's files, but not in those of earlier families with the same
            architecture.
    """

    required: Mapping[str, str] = DECODER
    more: Callable[[Metadata, Config], Config] = heads
    optional: Mapping[str, str] = {}
    constants: Mapping[str, Any] = SILU
    biases: Mapping[str, str] = {}
    theta: str | None = "rope_theta"
    share: str | None = None
    scaling: Callable[[Metadata], Config] = lambda metadata: {}
    mark: str | None = None


class Gguf(NamedTuple):
    """A family in GGUF, in both directions.

    Attributes:
        architecture: GGUF's name, which several families may share.
        reading: from a file to config.json; None: such files are read as another family's.
        writes: key → its value for a model, besides what the files of every family say.
        modules: GGUF's names of a layer's modules → the Hub's, besides those that are in `Names`; None takes one of
            these out.
        layouts: (pattern of GGUF's tensor names, how these differ from the Hub's).
        joined: the tensors of a layer whose names do not follow from a module's, or that GGUF has in several. Of those
            for the same tensor, the first is written.
        period: one layer in this many has no window, unless the file says which; None: llama.cpp computes no windows.
        all_biases: whether llama.cpp has biases of attention's output and the MLP.
        soft_caps: whether llama.cpp caps attention's scores.
        norm: GGUF's name of the last norm.
        unadapted: a pattern of the names of modules whose adapters llama.cpp does not apply.
        own_head: False: llama.cpp knows no head but the embedding; True: it needs one even if that is the embedding.
    """

    architecture: str
    reading: Reading | None = Reading()
    writes: Mapping[str, Callable[["ModelConfig"], Any]] = {}
    modules: Mapping[str, str | None] = {}
    layouts: tuple[tuple[str, Layout], ...] = ()
    joined: tuple[Joined, ...] = ()
    period: int | None = None
    all_biases: bool = False
    soft_caps: bool = True
    norm: str = "output_norm"
    unadapted: str | None = None
    own_head: bool | None = None

    def layout_of(self, name: str) -> Layout | None:
        """The layout of the tensor with this name; None if it is the Hub's."""
        return next((layout for pattern, layout in self.layouts if re.fullmatch(pattern, name)), None)


def modules_of(family: "Family") -> dict[str, str]:
    """GGUF's name of a module → the Hub's; `{layer}` and `{expert}` stand for numbers.

    GGUF has one tensor for all experts of a layer, the Hub one for each.
    """
    names = family.names
    outside = {
        "token_embd": names.embedding,
        "position_embd": names.positions,
        family.gguf.norm if family.gguf else "output_norm": names.norm,
        "output": names.head,
    }
    queries_keys_values = ("attn_q", "attn_k", "attn_v") if len(names.queries_keys_values) == 3 else ("attn_qkv",)
    mlp_up = ("ffn_gate", "ffn_up") if len(names.mlp_up) == 2 else ("ffn_up",)
    attention = dict(zip(queries_keys_values, names.queries_keys_values, strict=True)) | {"attn_output": names.output}
    mlp = dict(zip(mlp_up, names.mlp_up, strict=True)) | {"ffn_down": names.mlp_down}
    inside = {
        **{name: f"{names.attention}.{own}" for name, own in attention.items()},
        **{name: f"{names.mlp}.{own}" for name, own in mlp.items()},
        **dict(zip(("attn_norm", "post_attention_norm"), names.attention_norms, strict=True)),
        **dict(zip(("ffn_norm", "post_ffw_norm"), names.mlp_norms, strict=True)),
        **(family.gguf.modules if family.gguf else {}),
    }
    if own := names.layer_inputs:
        parts = ("per_layer_token_embd", "per_layer_model_proj", "per_layer_proj_norm")
        outside |= dict(zip(parts, own.outside, strict=True))
    stack = family.hub_name(names.stack)
    return {
        **{name: family.hub_name(path) for name, path in outside.items() if path},
        **{f"blk.{{layer}}.{name}": f"{stack}.{{layer}}.{own}" for name, own in inside.items() if own},
    }


def joined_of(family: "Family") -> tuple[Joined, ...]:
    """The tensors of a layer with names of their own, by their whole names; `{layer}` stands for its number."""
    stack = family.hub_name(family.names.stack)
    return tuple(
        joined._replace(
            name=f"{stack}.{{layer}}.{joined.name}",
            parts=tuple(f"blk.{{layer}}.{part}" for part in joined.parts),
        )
        for joined in (family.gguf.joined if family.gguf else ())
    )


def shortest(value: float) -> float:
    """The shortest decimal that rounds to the float32 `value`: 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value)))
