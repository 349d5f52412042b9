"""The Hub's names, and the only place that knows them: jlora stacks layers, the Hub names every layer by itself.

layers/self_attn/q_proj/kernel [L, D, N]  ↔  model.layers.{0…L-1}.self_attn.q_proj.weight, each [N, D]
"""

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from jlora import tree

# Ordered (jlora module path, Hub module name); `{layer}` marks a stack, whose leaves have a leading axis of layers.
MODULES: tuple[tuple[str, str], ...] = (
    (r"layers/(?P<rest>.+)", "model.layers.{layer}.{rest}"),
    (r"(?P<rest>embed_tokens|norm)", "model.{rest}"),
    (r"(?P<rest>lm_head|embed_out)", "{rest}"),
    (r"h/(?P<rest>.+)", "transformer.h.{layer}.{rest}"),
    (r"(?P<rest>wte|wpe|ln_f)", "transformer.{rest}"),
    (r"gpt_neox/layers/(?P<rest>.+)", "gpt_neox.layers.{layer}.{rest}"),
    (r"gpt_neox/(?P<rest>embed_in|final_layer_norm)", "gpt_neox.{rest}"),
)
# What the classes with a head put before their base model's names; checkpoints of the base model alone lack it.
PREFIXES = ("model.", "transformer.", "gpt_neox.")

# Leaf → the last part of the Hub's name, and whether the Hub stores the matrix as [out, in] where jlora has [in, out].
LEAVES: dict[str, tuple[str, bool]] = {
    "kernel": ("weight", True),
    "embedding": ("weight", False),
    "scale": ("weight", False),
    "bias": ("bias", False),
    "router": ("weight", True),
}
# GPT-2's linears are `Conv1D`, which store [in, out].
UNTRANSPOSED = r"h/.*/kernel"

# Kernels of experts, which the Hub stores one by one and unfused: the parts of their columns, in order.
EXPERTS = r"(?P<stack>.+)/mlp/experts/(?P<kernel>gate_up_proj|down_proj)"
EXPERT_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
# model_type → (name in the list above, name in its checkpoints); transformers renames as it loads.
CHECKPOINT_NAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "mixtral": (
        (r"\.mlp\.", ".block_sparse_moe."),
        (r"\.gate_proj\b", ".w1"),
        (r"\.up_proj\b", ".w3"),
        (r"\.down_proj\b", ".w2"),
    ),
}

# Buffers that old checkpoints carry and every loader recomputes.
HARMLESS = (
    r".*\.rotary_emb\.inv_freq",
    r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",
    r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias)",
)
# Copies of the embedding, written by some tools although the config says that head and embedding are one.
TIED_COPIES = (r"(lm_head|embed_out)\.weight",)

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
    """One tensor as the Hub has it, and where it lies in the leaf.

    Attributes:
        name, shape: the Hub's.
        transposed: whether it is the transpose of jlora's.
        index: of the leaf's leading axes: (), (layer,) or (layer, expert).
        columns: which of the leaf's last axis it is; None for all.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool
    index: tuple[int, ...] = ()
    columns: tuple[int, int] | None = None


def module_names(module: str, count: int) -> list[str]:
    """transformers' module names for a jlora module path: one a layer for a stacked module, otherwise just one.

    "layers/self_attn/q_proj", 2 → ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]

    Args:
        count: the length of the leading axis of a stacked module's leaves.

    Raises:
        ValueError: no rule covers the module.
    """
    stack = tree.stack_of(module)
    canonical = f"{stack.name}/{stack.rest}" if stack else module
    for pattern, template in MODULES:
        match = re.fullmatch(pattern, canonical)
        if match:
            rest = match["rest"].replace("/", ".")
            return [template.format(layer=layer, rest=rest) for layer in (stack.indices(count) if stack else [0])]
    raise ValueError(f"module {module!r} has no name on the Hub: no rule of jlora.hub.names.MODULES covers it")


def hub_tensors(path: str, shape: tuple[int, ...], model_type: str = "") -> list[HubTensor]:
    """The Hub's tensors that hold the leaf at `path`, in the order of its leading axes and of its columns.

    Args:
        model_type: some families' checkpoints have names of their own.

    Raises:
        ValueError: the leaf has no counterpart on the Hub.
    """
    module, _, leaf = path.rpartition("/")
    if leaf not in LEAVES:
        raise ValueError(f"{path!r} has no name on the Hub: leaves with one are {', '.join(sorted(LEAVES))}")
    suffix, transposed = LEAVES[leaf]
    transposed = transposed and not re.fullmatch(UNTRANSPOSED, path)
    stacked = tree.stack_of(path) is not None
    names = module_names(module, shape[0] if stacked else 1)
    if experts := re.fullmatch(EXPERTS, module):
        tensors = _expert_tensors(names, shape, EXPERT_PARTS[experts["kernel"]])
    else:
        inner = shape[1:] if stacked else shape
        inner = inner[::-1] if transposed else inner
        tensors = [
            HubTensor(f"{name}.{suffix}", inner, transposed, (layer,) if stacked else ())
            for layer, name in enumerate(names)
        ]
    return [tensor._replace(name=_checkpoint_name(tensor.name, model_type)) for tensor in tensors]


def _expert_tensors(names: list[str], shape: tuple[int, ...], parts: tuple[str, ...]) -> list[HubTensor]:
    _, experts, inputs, outputs = shape
    width = outputs // len(parts)
    return [
        HubTensor(
            f"{name.rpartition('.')[0]}.{expert}.{part}.weight",
            (width, inputs),
            True,
            (layer, expert),
            (i * width, (i + 1) * width),
        )
        for layer, name in enumerate(names)
        for expert in range(experts)
        for i, part in enumerate(parts)
    ]


def _checkpoint_name(name: str, model_type: str) -> str:
    for pattern, replacement in CHECKPOINT_NAMES.get(model_type, ()):
        name = re.sub(pattern, replacement, name)
    return name


def without_prefix(expected: Iterable[str], found: Collection[str]) -> dict[str, str]:
    """Expected name → the name it has in a checkpoint of the base model alone, where only that is `found`."""
    stripped = {name: name.removeprefix(prefix) for name in expected for prefix in PREFIXES if name.startswith(prefix)}
    return {name: short for name, short in stripped.items() if name not in found and short in found}


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
