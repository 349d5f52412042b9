"""The Hub's names, which only this module knows: jlora stacks layers, while the Hub has a name for each layer.

layers/self_attn/q_proj/kernel [L, D, N]  ↔  model.layers.{0…L-1}.self_attn.q_proj.weight, each [N, D]
"""

import functools
import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from jlora import tree
from jlora.errors import UserError

# Ordered (jlora module path, Hub module name); `{layer}` marks a stack, whose leaves have a leading layers axis.
MODULES: tuple[tuple[str, str], ...] = (
    (r"layers/(?P<rest>.+)", "model.layers.{layer}.{rest}"),
    (r"(?P<rest>embed_tokens|norm)", "model.{rest}"),
    (r"(?P<rest>lm_head|embed_out|score)", "{rest}"),
    (r"h/(?P<rest>.+)", "transformer.h.{layer}.{rest}"),
    (r"(?P<rest>wte|wpe|ln_f)", "transformer.{rest}"),
    (r"gpt_neox/layers/(?P<rest>.+)", "gpt_neox.layers.{layer}.{rest}"),
    (r"gpt_neox/(?P<rest>embed_in|final_layer_norm)", "gpt_neox.{rest}"),
)
# Classes with a head put these before their base model's names; checkpoints of the base model alone do not have them.
PREFIXES = ("model.", "transformer.", "gpt_neox.")

# Leaf → (last part of the Hub's name, whether the Hub stores the matrix as [out, in], while jlora has [in, out]).
LEAVES: dict[str, tuple[str, bool]] = {
    "kernel": ("weight", True),
    "embedding": ("weight", False),
    "scale": ("weight", False),
    "bias": ("bias", False),
    "router": ("weight", True),
}
# GPT-2's linears are `Conv1D`, which store [in, out].
UNTRANSPOSED = r"h/.*/kernel"

# Kernels of experts, which the Hub stores one by one and unfused. EXPERT_PARTS: the parts of their columns, in order.
EXPERTS = r"(?P<stack>.+)/mlp/experts/(?P<kernel>gate_up_proj|down_proj)"
EXPERT_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
# model_type → (pattern in the names from above, replacement in its checkpoints); transformers renames as it loads.
CHECKPOINT_NAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "mixtral": (
        (r"\.mlp\.", ".block_sparse_moe."),
        (r"\.gate_proj\b", ".w1"),
        (r"\.up_proj\b", ".w3"),
        (r"\.down_proj\b", ".w2"),
    ),
}

# Buffers that old checkpoints have and every loader recomputes.
HARMLESS = (
    r".*\.rotary_emb\.inv_freq",
    r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",
    r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias)",
)

# GGUF's module name → the Hub's; `{expert}` marks a stack of experts, which the Hub stores one by one.
Table = dict[str, str]


def _layer_table(stack: str, modules: Table) -> Table:
    return {f"blk.{{layer}}.{name}": f"{stack}.{{layer}}.{hub_name}" for name, hub_name in modules.items()}


_model_layers = functools.partial(_layer_table, "model.layers")
GGUF_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
GGUF_ATTENTION = _model_layers(
    {f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"} | {"attn_output": "self_attn.o_proj"}
)
GGUF_MLP = _model_layers({f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")})
GGUF_LINEARS = GGUF_ATTENTION | GGUF_MLP
GGUF_QK_NORMS = _model_layers({f"attn_{x}_norm": f"self_attn.{x}_norm" for x in "qk"})
GGUF_NORMS_BEFORE = _model_layers({"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"})
GGUF_NORMS_AFTER = _model_layers(
    {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
)
GGUF_NORMS_AROUND = (
    _model_layers({"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm"}) | GGUF_NORMS_AFTER
)
GGUF_EXPERTS = _model_layers(
    {"ffn_gate_inp": "mlp.gate"} | {f"ffn_{x}_exps": f"mlp.experts.{{expert}}.{x}_proj" for x in ("gate", "up", "down")}
)
GGUF_LLAMA = GGUF_OUTSIDE | GGUF_LINEARS | GGUF_NORMS_BEFORE
GGUF_PHI3 = _model_layers(
    {
        "attn_qkv": "self_attn.qkv_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_up": "mlp.gate_up_proj",
        "ffn_down": "mlp.down_proj",
    }
)
GGUF_GPT2 = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
} | _layer_table(
    "transformer.h",
    {
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    },
)
GGUF_NEOX = {
    "token_embd": "gpt_neox.embed_in",
    "output_norm": "gpt_neox.final_layer_norm",
    "output": "embed_out",
} | _layer_table(
    "gpt_neox.layers",
    {
        "attn_norm": "input_layernorm",
        "attn_qkv": "attention.query_key_value",
        "attn_output": "attention.dense",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.dense_h_to_4h",
        "ffn_down": "mlp.dense_4h_to_h",
    },
)
# model_type → GGUF's names for its modules.
GGUF_MODULES: dict[str, Table] = {
    "llama": GGUF_LLAMA,
    "internlm3": GGUF_LLAMA,
    "iquestcoder": GGUF_LLAMA,
    "mistral": GGUF_LLAMA,
    "mixtral": GGUF_OUTSIDE | GGUF_ATTENTION | GGUF_NORMS_BEFORE | GGUF_EXPERTS,
    "smollm3": GGUF_LLAMA,
    "granite": GGUF_LLAMA,
    "olmo2": GGUF_OUTSIDE | GGUF_LINEARS | GGUF_QK_NORMS | GGUF_NORMS_AFTER,
    "qwen2": GGUF_LLAMA,
    "qwen3": GGUF_LLAMA | GGUF_QK_NORMS,
    "qwen3_moe": GGUF_LLAMA | GGUF_QK_NORMS | GGUF_EXPERTS,
    "gemma": GGUF_LLAMA,
    "gemma2": GGUF_OUTSIDE | GGUF_LINEARS | GGUF_NORMS_AROUND,
    "gemma3_text": GGUF_OUTSIDE | GGUF_LINEARS | GGUF_QK_NORMS | GGUF_NORMS_AROUND,
    "phi3": GGUF_OUTSIDE | GGUF_NORMS_BEFORE | GGUF_PHI3,
    "gpt2": GGUF_GPT2,
    "gpt-sw3": GGUF_GPT2,
    "gpt_neox": GGUF_NEOX,
}


class HubTensor(NamedTuple):
    """One of the Hub's tensors, and its place in the leaf.

    Attributes:
        name, shape: the Hub's.
        transposed: whether it is the transpose of jlora's.
        index: its index in the leaf's leading axes: (), (layer,) or (layer, expert).
        columns: (start, stop) of its part of the leaf's last axis; None for all.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool
    index: tuple[int, ...] = ()
    columns: tuple[int, int] | None = None


def module_names(module: str, count: int) -> list[str]:
    """transformers' module names for a jlora module path: one per layer for a stacked module, otherwise just one.

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
    raise UserError(
        f"module {module!r} has no name on the Hub: no rule of jlora.hub.checkpoints.names.MODULES covers it"
    )


def hub_tensors(path: str, shape: tuple[int, ...], model_type: str = "") -> list[HubTensor]:
    """The Hub's tensors that hold the leaf at `path`, in the order of its leading axes and then its columns.

    Args:
        model_type: the model's family; some families' checkpoints use other names.

    Raises:
        ValueError: the leaf has no counterpart on the Hub.
    """
    module, _, leaf = path.rpartition("/")
    if leaf not in LEAVES:
        raise UserError(f"{path!r} has no name on the Hub: leaves with one are {', '.join(sorted(LEAVES))}")
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
    """Expected name → its name in a checkpoint of the base model alone, if the tensor is `found` only under that."""
    stripped = {name: name.removeprefix(prefix) for name in expected for prefix in PREFIXES if name.startswith(prefix)}
    return {name: short for name, short in stripped.items() if name not in found and short in found}


def is_harmless(name: str) -> bool:
    """Whether a checkpoint may hold the tensor `name` although the model has no such leaf."""
    return any(re.fullmatch(pattern, name) for pattern in HARMLESS)


def from_gguf(names: Iterable[str], model_type: str = "llama") -> dict[str, str]:
    """GGUF tensor name → Hub tensor name; tensors that are not weights of such a model are left out.

    "blk.3.attn_q.weight" → "model.layers.3.self_attn.q_proj.weight"
    "blk.3.ffn_up_exps.weight" → "model.layers.3.mlp.experts.{expert}.up_proj.weight", for one tensor [E, F, D]
    """
    found: dict[str, str] = {}
    for name in names:
        module, _, suffix = name.rpartition(".")
        template, layer = _numbers_out(module, layer=r"(?<=^blk\.)\d+")
        if hub_name := GGUF_MODULES[model_type].get(template):
            hub_name = hub_name.replace("{layer}", layer.get("layer", ""))
            found[name] = _checkpoint_name(f"{hub_name}.{suffix}", model_type)
    return found


def to_gguf(name: str, model_type: str) -> str:
    """GGUF's name for one of the Hub's tensors; for one expert's, the name of the tensor of all experts.

    Raises:
        ValueError: GGUF has no such tensor.
    """
    module, _, suffix = name.rpartition(".")
    template, numbers = _numbers_out(module, layer=r"(?<=\.layers\.)\d+|(?<=\.h\.)\d+", expert=r"(?<=\.experts\.)\d+")
    for gguf_name, hub_name in GGUF_MODULES[model_type].items():
        if _checkpoint_name(hub_name, model_type) == template:
            return f"{gguf_name.replace('{layer}', numbers.get('layer', ''))}.{suffix}"
    raise UserError(f"{name} has no name in GGUF: {model_type} has no such module there")


def _numbers_out(name: str, **patterns: str) -> tuple[str, dict[str, str]]:
    """(the name with each number that matches replaced by "{kind}", the numbers by kind)."""
    numbers = {}
    for kind, pattern in patterns.items():
        if found := re.search(pattern, name):
            numbers[kind] = found[0]
            name = f"{name[: found.start()]}{{{kind}}}{name[found.end() :]}"
    return name, numbers
