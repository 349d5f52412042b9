"""The Hub's names, which only this module knows: jlora stacks layers, while the Hub has a name for each layer.

layers/self_attn/q_proj/kernel [L, D, N]  ↔  model.layers.{0…L-1}.self_attn.q_proj.weight, each [N, D]
"""

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from jlora import tree
from jlora.errors import UserError
from jlora.families import FAMILIES, called, each, every
from jlora.families.family import OUT_IN, SCORE
from jlora.families.gguf import joined_of, modules_of
from jlora.families.layouts import Joined

# jlora's path of a stack → its name in transformers; the same for modules outside of stacks.
STACKS = dict(each(lambda family: (family.names.stack, family.hub_name(family.names.stack))))
OUTSIDE = {SCORE: SCORE} | {
    path: family.hub_name(path) for family in FAMILIES.values() for path in family.names.outside
}
# Classes with a head put these before their base model's names; checkpoints of the base model alone do not have them.
PREFIXES = each(lambda family: family.prefix)

# Leaf → (last part of the Hub's name, whether the Hub stores the matrix as [out, in], while jlora has [in, out]).
LEAVES: dict[str, tuple[str, bool]] = {
    "kernel": ("weight", True),
    "embedding": ("weight", False),
    "scale": ("weight", False),
    "bias": ("bias", False),
    "router": ("weight", True),
    "sinks": ("sinks", False),
    "value": ("", False),  # of a parameter that is no module: its name is the tensor's
    "filter": ("weight", True),
    "e_score_correction_bias": ("e_score_correction_bias", False),
}
# Linears that are transformers' `Conv1D`, which store [in, out].
_STACKS = "|".join(each(lambda family: family.names.stack if family.untransposed else None))
UNTRANSPOSED = rf"({_STACKS})(@[^/]+)?/.*/kernel"

# Kernels of experts, which the Hub stores one by one and unfused, but in some families as transformers has them
# (`Family.stacked_experts`). EXPERT_PARTS: the parts of their columns, in order.
EXPERTS = r"(?P<stack>.+)/experts/(?P<kernel>gate_up_proj|up_proj|down_proj)"
EXPERT_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}
# model_type → GGUF's name of a module → the Hub's.
GGUF_MODULES = {kind: modules_of(family) for kind, family in FAMILIES.items() if family.gguf}
# The same of single tensors.
GGUF_JOINED = {kind: joined_of(family) for kind, family in FAMILIES.items() if family.gguf}
# The number of a layer in the Hub's names.
LAYER = "|".join(rf"(?<=\.{name}\.)\d+" for name in called("stack"))


# Buffers that old checkpoints have and every loader recomputes.
HARMLESS = every(lambda family: family.buffers)


class HubTensor(NamedTuple):
    """One of the Hub's tensors, and its place in the leaf.

    Attributes:
        name, shape: the Hub's.
        transposed: whether it is the transpose of jlora's.
        by_expert: whether it holds all experts' matrices, each of which is transposed by itself.
        index: its index in the leaf's leading axes: (), (layer,) or (layer, expert).
        columns: (start, stop) of its part of the leaf's last axis; None for all.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool
    index: tuple[int, ...] = ()
    columns: tuple[int, int] | None = None
    by_expert: bool = False

    @property
    def order(self) -> tuple[int, ...]:
        """The order of the axes in jlora's layout; the same order leads back."""
        axes = tuple(range(len(self.shape)))
        if not self.transposed:
            return axes
        return (0, 2, 1) if self.by_expert else axes[::-1]


def module_names(module: str, count: int) -> list[str]:
    """transformers' module names for a jlora module path: one per layer for a stacked module, otherwise just one.

    "layers/self_attn/q_proj", 2 → ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]

    Args:
        count: the length of the leading axis of a stacked module's leaves.

    Raises:
        ValueError: no family has such a module.
    """
    stack = tree.stack_of(module)
    canonical = f"{stack.name}/{stack.rest}" if stack else module
    if canonical in OUTSIDE:
        return [OUTSIDE[canonical]]
    for path, hub_name in STACKS.items():
        if canonical.startswith(f"{path}/"):
            rest = canonical.removeprefix(f"{path}/").replace("/", ".")
            return [f"{hub_name}.{layer}.{rest}" for layer in (stack.indices(count) if stack else [0])]
    raise UserError(f"module {module!r} has no name on the Hub: no family of jlora.families has such a module")


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
    family = FAMILIES.get(model_type)
    experts = re.fullmatch(EXPERTS, module)
    if experts and (leaf == "bias" or (family and family.stacked_experts)):
        turned = leaf == "kernel" and family is not None and family.stacked_experts == OUT_IN
        inner = (shape[1], shape[3], shape[2]) if turned else shape[1:]
        tensors = [
            HubTensor(f"{name}{'_bias' if leaf == 'bias' else ''}", inner, turned, (layer,), by_expert=True)
            for layer, name in enumerate(names)
        ]
    elif experts:
        tensors = _expert_tensors(names, shape, EXPERT_PARTS[experts["kernel"]])
    else:
        inner = shape[1:] if stacked else shape
        inner = inner[::-1] if transposed else inner
        tensors = [
            HubTensor(f"{name}.{suffix}" if suffix else name, inner, transposed, (layer,) if stacked else ())
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
    family = FAMILIES.get(model_type)
    for pattern, replacement in family.checkpoint_names if family else ():
        name = re.sub(pattern, replacement, name)
    return name


def without_prefix(expected: Iterable[str], found: Collection[str]) -> dict[str, str]:
    """Expected name → its name in a checkpoint of the base model alone, if the tensor is `found` only under that."""
    stripped = {name: name.removeprefix(prefix) for name in expected for prefix in PREFIXES if name.startswith(prefix)}
    return {name: short for name, short in stripped.items() if name not in found and short in found}


def is_harmless(name: str, model_type: str | None = None) -> bool:
    """Whether a checkpoint may hold the tensor `name` although the model has no such leaf.

    Args:
        model_type: the model's family; None: any, and the tensors that a family's layers may leave unused are kept.
    """
    patterns = HARMLESS if model_type is None else FAMILIES[model_type].buffers + FAMILIES[model_type].spare
    return any(re.fullmatch(pattern, name) for pattern in patterns)


class InGGUF(NamedTuple):
    """What GGUF has for one of the Hub's tensors.

    Attributes:
        names: GGUF's tensors.
        joined: how they are put together; None if there is one, named after its module.
    """

    names: tuple[str, ...]
    joined: Joined | None = None


def from_gguf(names: Iterable[str], model_type: str = "llama") -> dict[str, InGGUF]:
    """Hub tensor name → the GGUF tensors among `names` that it is made of; those of no such model are left out.

    "model.layers.3.self_attn.q_proj.weight" → "blk.3.attn_q.weight"
    "model.layers.3.mlp.experts.{expert}.up_proj.weight" → "blk.3.ffn_up_exps.weight", one tensor [E, F, D]
    """
    there = dict.fromkeys(names)
    found: dict[str, InGGUF] = {}
    for name in there:
        template, numbers = _numbers_out(name, layer=r"(?<=^blk\.)\d+")
        layer = numbers.get("layer", "")
        named = [joined for joined in GGUF_JOINED[model_type] if template in joined.parts]
        for joined in named:
            parts = tuple(part.replace("{layer}", layer) for part in joined.parts)
            if set(parts) <= there.keys():
                hub_name = _checkpoint_name(joined.name.replace("{layer}", layer), model_type)
                found.setdefault(hub_name, InGGUF(parts, joined))
        module, _, suffix = template.rpartition(".")
        if not named and (hub_name := GGUF_MODULES[model_type].get(module)):
            hub_name = hub_name.replace("{layer}", layer)
            found[_checkpoint_name(f"{hub_name}.{suffix}", model_type)] = InGGUF((name,))
    return found


def to_gguf(name: str, model_type: str) -> InGGUF:
    """What GGUF has for one of the Hub's tensors; for one expert's, the tensor of all experts.

    Raises:
        ValueError: GGUF has no such tensor.
    """
    template, numbers = _numbers_out(name, layer=LAYER, expert=r"(?<=\.experts\.)\d+")
    layer = numbers.get("layer", "")
    for joined in GGUF_JOINED[model_type]:
        if _checkpoint_name(joined.name, model_type) == template:
            return InGGUF(tuple(part.replace("{layer}", layer) for part in joined.parts), joined)
    suffix = template.rpartition(".")[2]
    for gguf_name, hub_name in GGUF_MODULES[model_type].items():
        if _checkpoint_name(f"{hub_name}.{suffix}", model_type) == template:
            return InGGUF((f"{gguf_name.replace('{layer}', layer)}.{suffix}",))
    raise UserError(f"{name} has no name in GGUF: {model_type} has no such module there")


def _numbers_out(name: str, **patterns: str) -> tuple[str, dict[str, str]]:
    """(the name with each number that matches replaced by "{kind}", the numbers by kind)."""
    numbers = {}
    for kind, pattern in patterns.items():
        if found := re.search(pattern, name):
            numbers[kind] = found[0]
            name = f"{name[: found.start()]}{{{kind}}}{name[found.end() :]}"
    return name, numbers
