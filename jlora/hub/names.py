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
    (r"(?P<rest>lm_head|embed_out|score)", "{rest}"),
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

# (GGUF's module name, the Hub's); `{expert}` marks a stack of experts, which the Hub stores one by one.
GGUF_OUTSIDE = (
    (r"token_embd", "model.embed_tokens"),
    (r"output_norm", "model.norm"),
    (r"output", "lm_head"),
)
GGUF_LINEARS = (
    (r"blk\.(\d+)\.attn_([qkv])", r"model.layers.\1.self_attn.\2_proj"),
    (r"blk\.(\d+)\.attn_output", r"model.layers.\1.self_attn.o_proj"),
    (r"blk\.(\d+)\.ffn_(gate|up|down)", r"model.layers.\1.mlp.\2_proj"),
)
GGUF_QK_NORMS = ((r"blk\.(\d+)\.attn_([qk])_norm", r"model.layers.\1.self_attn.\2_norm"),)
GGUF_NORMS_BEFORE = (
    (r"blk\.(\d+)\.attn_norm", r"model.layers.\1.input_layernorm"),
    (r"blk\.(\d+)\.ffn_norm", r"model.layers.\1.post_attention_layernorm"),
)
GGUF_NORMS_AFTER = (
    (r"blk\.(\d+)\.post_attention_norm", r"model.layers.\1.post_attention_layernorm"),
    (r"blk\.(\d+)\.post_ffw_norm", r"model.layers.\1.post_feedforward_layernorm"),
)
GGUF_NORMS_AROUND = (
    (r"blk\.(\d+)\.attn_norm", r"model.layers.\1.input_layernorm"),
    (r"blk\.(\d+)\.ffn_norm", r"model.layers.\1.pre_feedforward_layernorm"),
    *GGUF_NORMS_AFTER,
)
GGUF_EXPERTS = (
    (r"blk\.(\d+)\.ffn_gate_inp", r"model.layers.\1.mlp.gate"),
    (r"blk\.(\d+)\.ffn_(gate|up|down)_exps", r"model.layers.\1.mlp.experts.{expert}.\2_proj"),
)
GGUF_LLAMA = (*GGUF_OUTSIDE, *GGUF_LINEARS, *GGUF_NORMS_BEFORE)
# model_type → GGUF's names for its modules.
GGUF_MODULES: dict[str, tuple[tuple[str, str], ...]] = {
    "llama": GGUF_LLAMA,
    "mistral": GGUF_LLAMA,
    "mixtral": (*GGUF_LLAMA, *GGUF_EXPERTS),
    "smollm3": GGUF_LLAMA,
    "granite": GGUF_LLAMA,
    "olmo2": (*GGUF_OUTSIDE, *GGUF_LINEARS, *GGUF_QK_NORMS, *GGUF_NORMS_AFTER),
    "qwen2": GGUF_LLAMA,
    "qwen3": (*GGUF_LLAMA, *GGUF_QK_NORMS),
    "qwen3_moe": (*GGUF_LLAMA, *GGUF_QK_NORMS, *GGUF_EXPERTS),
    "gemma": GGUF_LLAMA,
    "gemma2": (*GGUF_OUTSIDE, *GGUF_LINEARS, *GGUF_NORMS_AROUND),
    "gemma3_text": (*GGUF_OUTSIDE, *GGUF_LINEARS, *GGUF_QK_NORMS, *GGUF_NORMS_AROUND),
    "phi3": (
        *GGUF_OUTSIDE,
        *GGUF_NORMS_BEFORE,
        (r"blk\.(\d+)\.attn_qkv", r"model.layers.\1.self_attn.qkv_proj"),
        (r"blk\.(\d+)\.attn_output", r"model.layers.\1.self_attn.o_proj"),
        (r"blk\.(\d+)\.ffn_up", r"model.layers.\1.mlp.gate_up_proj"),
        (r"blk\.(\d+)\.ffn_down", r"model.layers.\1.mlp.down_proj"),
    ),
    "gpt2": (
        (r"token_embd", "transformer.wte"),
        (r"position_embd", "transformer.wpe"),
        (r"output_norm", "transformer.ln_f"),
        (r"output", "lm_head"),
        (r"blk\.(\d+)\.attn_norm", r"transformer.h.\1.ln_1"),
        (r"blk\.(\d+)\.attn_qkv", r"transformer.h.\1.attn.c_attn"),
        (r"blk\.(\d+)\.attn_output", r"transformer.h.\1.attn.c_proj"),
        (r"blk\.(\d+)\.ffn_norm", r"transformer.h.\1.ln_2"),
        (r"blk\.(\d+)\.ffn_up", r"transformer.h.\1.mlp.c_fc"),
        (r"blk\.(\d+)\.ffn_down", r"transformer.h.\1.mlp.c_proj"),
    ),
    "gpt_neox": (
        (r"token_embd", "gpt_neox.embed_in"),
        (r"output_norm", "gpt_neox.final_layer_norm"),
        (r"output", "embed_out"),
        (r"blk\.(\d+)\.attn_norm", r"gpt_neox.layers.\1.input_layernorm"),
        (r"blk\.(\d+)\.attn_qkv", r"gpt_neox.layers.\1.attention.query_key_value"),
        (r"blk\.(\d+)\.attn_output", r"gpt_neox.layers.\1.attention.dense"),
        (r"blk\.(\d+)\.ffn_norm", r"gpt_neox.layers.\1.post_attention_layernorm"),
        (r"blk\.(\d+)\.ffn_up", r"gpt_neox.layers.\1.mlp.dense_h_to_4h"),
        (r"blk\.(\d+)\.ffn_down", r"gpt_neox.layers.\1.mlp.dense_4h_to_h"),
    ),
}


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


def from_gguf(names: Iterable[str], model_type: str = "llama") -> dict[str, str]:
    """GGUF tensor name → Hub tensor name, for those that are weights of such a model; others are left out.

    "blk.3.attn_q.weight" → "model.layers.3.self_attn.q_proj.weight"
    "blk.3.ffn_up_exps.weight" → "model.layers.3.mlp.experts.{expert}.up_proj.weight", of one tensor [E, F, D]
    """
    found: dict[str, str] = {}
    for name in names:
        module, _, suffix = name.rpartition(".")
        for pattern, replacement in GGUF_MODULES[model_type]:
            match = re.fullmatch(pattern, module)
            if match:
                found[name] = _checkpoint_name(f"{match.expand(replacement)}.{suffix}", model_type)
    return found
