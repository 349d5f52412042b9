"""The Hub's names, and the only place that knows them: jlora stacks layers, the Hub names every layer by itself.

layers/self_attn/q_proj/kernel [L, D, N]  ↔  model.layers.{0…L-1}.self_attn.q_proj.weight, each [N, D]
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

# Ordered (jlora module path, Hub module name); `{layer}` marks a stack, whose leaves have a leading axis of layers.
MODULES: tuple[tuple[str, str], ...] = (
    (r"layers/(?P<rest>.+)", "model.layers.{layer}.{rest}"),
    (r"(?P<rest>embed_tokens|norm)", "model.{rest}"),
    (r"(?P<rest>lm_head)", "{rest}"),
)

# Leaf → the last part of the Hub's name, and whether the Hub stores the matrix as [out, in] where jlora has [in, out].
LEAVES: dict[str, tuple[str, bool]] = {
    "kernel": ("weight", True),
    "embedding": ("weight", False),
    "scale": ("weight", False),
    "bias": ("bias", False),
}

# Buffers that old checkpoints carry and every loader recomputes.
HARMLESS = (r".*\.rotary_emb\.inv_freq",)
# Copies of the embedding, written by some tools although the config says that head and embedding are one.
TIED_COPIES = (r"lm_head\.weight",)

# GGUF's names for the modules of its `llama` architecture.
GGUF_MODULES: tuple[tuple[str, str], ...] = (
    (r"token_embd", "model.embed_tokens"),
    (r"output_norm", "model.norm"),
    (r"output", "lm_head"),
    (r"blk\.(\d+)\.attn_norm", r"model.layers.\1.input_layernorm"),
    (r"blk\.(\d+)\.ffn_norm", r"model.layers.\1.post_attention_layernorm"),
    (r"blk\.(\d+)\.attn_([qkv])", r"model.layers.\1.self_attn.\2_proj"),
    (r"blk\.(\d+)\.attn_output", r"model.layers.\1.self_attn.o_proj"),
    (r"blk\.(\d+)\.ffn_(gate|up|down)", r"model.layers.\1.mlp.\2_proj"),
)


class HubTensor(NamedTuple):
    """One tensor as the Hub has it: its name, its shape there, and whether it is the transpose of jlora's."""

    name: str
    shape: tuple[int, ...]
    transposed: bool


def is_stacked(path: str) -> bool:
    """Whether the module or leaf at `path` has a leading axis of layers."""
    return path.startswith("layers/")


def module_names(module: str, layers: int) -> list[str]:
    """The Hub's module names for a jlora module path: one a layer for a stacked module, otherwise just one.

    "layers/self_attn/q_proj", 2 → ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]

    Raises:
        ValueError: no rule covers the module.
    """
    for pattern, template in MODULES:
        match = re.fullmatch(pattern, module)
        if match:
            rest = match["rest"].replace("/", ".")
            count = layers if is_stacked(module) else 1
            return [template.format(layer=layer, rest=rest) for layer in range(count)]
    raise ValueError(f"module {module!r} has no name on the Hub: no rule of jlora.hub.names.MODULES covers it")


def hub_tensors(path: str, shape: tuple[int, ...]) -> list[HubTensor]:
    """The Hub's tensors that hold the leaf at `path`, in the order of the leaf's layers (one when it is not stacked).

    Raises:
        ValueError: the leaf has no counterpart on the Hub.
    """
    module, _, leaf = path.rpartition("/")
    if leaf not in LEAVES:
        raise ValueError(f"{path!r} has no name on the Hub: leaves with one are {', '.join(sorted(LEAVES))}")
    suffix, transposed = LEAVES[leaf]
    layers = shape[0] if is_stacked(path) else 1
    shape = shape[1:] if is_stacked(path) else shape
    shape = shape[::-1] if transposed else shape
    return [HubTensor(f"{name}.{suffix}", shape, transposed) for name in module_names(module, layers)]


def is_harmless(name: str, *, tied: bool) -> bool:
    """Whether a checkpoint may hold the tensor `name` although the model has no such leaf."""
    patterns = HARMLESS + (TIED_COPIES if tied else ())
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def from_gguf(names: Iterable[str]) -> dict[str, str]:
    """GGUF tensor name → Hub tensor name, for those that are weights of a `llama` model; others are left out.

    "blk.3.attn_q.weight" → "model.layers.3.self_attn.q_proj.weight"
    """
    found: dict[str, str] = {}
    for name in names:
        module, _, suffix = name.rpartition(".")
        for pattern, replacement in GGUF_MODULES:
            match = re.fullmatch(pattern, module)
            if match:
                found[name] = f"{match.expand(replacement)}.{suffix}"
    return found
