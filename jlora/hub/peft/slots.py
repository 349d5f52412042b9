"""The layout of PEFT's files: the modules that can be adapted, and a slot of the tree for each tensor."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jlora import quant, tree
from jlora.errors import UserError, describe_faults, number_of
from jlora.families import FAMILIES
from jlora.hub.checkpoints.score import KERNEL
from jlora.hub.checkpoints.weights import DTYPES, TensorInfo, read_tensor, read_tensors, require_finite
from jlora.hub.peft.config import CONFIG, AdapterConfig
from jlora.hub.peft.names import AdapterNames
from jlora.lora.kinds import COPIES, KINDS
from jlora.lora.kinds.copies import copy_of, original
from jlora.lora.kinds.kind import Leaf
from jlora.lora.kinds.product import A, B
from jlora.lora.kinds.tokens import ROWS
from jlora.lora.sites import Site, is_head, sites, tie
from jlora.models.model import SCORE
from jlora.types import Params

PREFIX = "base_model.model."
# What the names of experts' first kernels end in: PEFT wraps the experts once for each parameter, for down_proj last.
INNER = (".gate_up_proj", ".up_proj")
# Parts of names that occur only in a model in memory → where they come from.
MARKS = {
    r"(^|\.)_orig_mod\.": "torch.compile puts there (_orig_mod)",
    r"(^|\.)_fsdp_wrapped_module\.": "FSDP puts there (_fsdp_wrapped_module)",
    r"^module\.": "DistributedDataParallel puts there (module)",
    r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|modules_to_save)\.[^.]+(\.weight|\.bias)$"
    r"|\.(lora_embedding_[AB])\.[^.]+$": "is the adapter's name in memory",
}


# How the ends of tensors' names begin: those of the kinds of adapter, and those of the methods that are converted.
BEGINNINGS = tuple(dict.fromkeys(leaf.peft.partition("_")[0] for kind in KINDS for leaf in kind.leaves if leaf.peft))
BEGINNINGS += ("hada", "lokr", "ia3", "vera")


class Codec(NamedTuple):
    """Converts one layer's values between their layouts in the tree and in the file."""

    to_file: Callable[[np.ndarray], np.ndarray]
    from_file: Callable[[np.ndarray], np.ndarray]


PLAIN = Codec(lambda x: x, lambda x: x)
TRANSPOSED = Codec(lambda x: x.T, lambda x: x.T)


def _expert_codecs(experts: int) -> tuple[Codec, Codec]:
    """A [E, D, R] ↔ [E·R, D], expert by expert; B [E, R, N] ↔ [N, R·E], rank by rank (PEFT's `ParamWrapper`)."""
    a = Codec(
        lambda x: x.swapaxes(1, 2).reshape(-1, x.shape[1]),
        lambda x: x.reshape(experts, -1, x.shape[-1]).swapaxes(1, 2),
    )
    b = Codec(
        lambda x: x.transpose(2, 1, 0).reshape(x.shape[2], -1),
        lambda x: x.reshape(x.shape[0], -1, experts).transpose(2, 1, 0),
    )
    return a, b


def _exchanged_codecs(experts: int) -> tuple[Codec, Codec]:
    """A [E, D, R] ↔ [D, R·E], rank by rank; B [E, R, N] ↔ [E·R, N], expert by expert."""
    a = Codec(
        lambda x: x.transpose(1, 2, 0).reshape(x.shape[1], -1),
        lambda x: x.reshape(x.shape[0], -1, experts).transpose(2, 0, 1),
    )
    b = Codec(lambda x: x.reshape(-1, x.shape[-1]), lambda x: x.reshape(experts, -1, x.shape[-1]))
    return a, b


def _flat_codecs(inputs: tuple[int, ...], outputs: tuple[int, ...]) -> tuple[Codec, Codec]:
    """A [*inputs, R] ↔ [R, inputs], B [R, *outputs] ↔ [outputs, R]."""
    a = Codec(lambda x: x.reshape(-1, x.shape[-1]).T, lambda x: x.T.reshape(*inputs, -1))
    b = Codec(lambda x: x.reshape(x.shape[0], -1).T, lambda x: x.T.reshape(-1, *outputs))
    return a, b


class Module(NamedTuple):
    """One site of one layer, as PEFT sees it.

    Attributes:
        name: PEFT's name of the module, or of the parameter ("….experts.down_proj", "….gate.weight").
        site: its place in the tree.
        index: the layer's index in its stack (None if not stacked).
        tensors: the beginning of its tensors' names.
        exchanged: whether the file has A and B the other way round (see `jlora.hub.peft.experts`).
    """

    name: str
    site: Site
    index: int | None
    tensors: str
    exchanged: bool = False

    @property
    def path(self) -> str:
        return self.site.path

    @property
    def is_parameter(self) -> bool:
        return self.site.is_parameter

    def tensor(self, leaf: Leaf, rank: int) -> tuple[str, tuple[int, ...], Codec]:
        """(name, shape, codec) of the file's tensor that holds a kind's leaf beside this weight."""
        ranks = rank * max(1, self.site.experts)
        sizes = {"inputs": self.site.inputs, "rank": ranks, "shard": rank, "outputs": self.site.outputs}
        shape = tuple(sizes[axis] for axis in leaf.axes)
        if "rank" not in leaf.axes:
            return f"{self.tensors}.{leaf.peft}", shape, PLAIN
        side = leaf.axes.index("rank")  # 1 for A, 0 for B
        if self.exchanged:
            other = B if side else A
            return f"{self.tensors}.{other.peft}", shape, _exchanged_codecs(self.site.experts)[1 - side]
        end = (leaf.peft_embedding if self.site.leaf == "embedding" else "") or leaf.peft
        return f"{self.tensors}.{end}", shape[::-1] if leaf.turned else shape, self._codec(leaf, side)

    def tensors_of(self, config: AdapterConfig, rank: int) -> dict[Leaf, tuple[str, tuple[int, ...], Codec]]:
        """`tensor` of every leaf of the kinds that a config asks for."""
        return {leaf: self.tensor(leaf, rank) for leaf in file_leaves(config)}

    def used(self, leaf: Leaf, value: np.ndarray, rank: int) -> np.ndarray:
        """The first `rank` of one layer's ranks; the others are padding."""
        return value if leaf.rank_axis is None else np.take(value, range(rank), self._rank_axis(leaf))

    def padded(self, leaf: Leaf, value: np.ndarray, rank: int) -> np.ndarray:
        """A value that `used` returned, zero-padded to `rank`."""
        if leaf.rank_axis is None:
            return value
        widths, axis = [(0, 0)] * value.ndim, self._rank_axis(leaf)
        widths[axis] = (0, rank - value.shape[axis])
        return np.pad(value, widths)

    def _rank_axis(self, leaf: Leaf) -> int:
        # B of a kernel with several output axes has as many after its ranks.
        return 0 if leaf.axes[0] == "rank" and not self.site.experts else leaf.rank_axis

    def _codec(self, leaf: Leaf, side: int) -> Codec:
        if not leaf.turned:
            return PLAIN
        if self.site.experts:
            return _expert_codecs(self.site.experts)[1 - side]
        if self.site.axes != (1, 1):
            before, outputs = self.site.factor_shapes
            return _flat_codecs(before[len(before) - self.site.axes[0] :], outputs)[1 - side]
        return TRANSPOSED


def file_leaves(config: AdapterConfig) -> list[Leaf]:
    """The leaves beside an adapted weight that a file with this config has tensors for."""
    return [
        leaf
        for kind in KINDS
        if kind.wanted(config)
        for leaf in kind.leaves
        if leaf.peft and not {"tokens", "width"} & set(leaf.axes)
    ]


class Slot(NamedTuple):
    """The place of one of the file's tensors in the tree, with its shape and codec."""

    path: str
    index: int | None
    shape: tuple[int, ...]
    codec: Codec


# ---------------------------------------------------------------- what there is to adapt


def find_modules(params: Params, found: Mapping[str, TensorInfo] | None = None) -> list[Module]:
    """Every module that PEFT could adapt, layer by layer, in the order of the tree.

    Args:
        found: a file's tensors, whose shapes tell which axes of a kernel with more than two are inputs.
    """
    flat = tree.flatten(params)
    called = AdapterNames(flat)
    return [module for site in sites(params) for module in _layers(site, flat, found or {}, called)]


def _layers(
    site: Site, flat: Mapping[str, Any], found: Mapping[str, TensorInfo], called: AdapterNames
) -> Iterator[Module]:
    if site.tied_to:
        yield Module(site.path, site, None, PREFIX + site.path)
        return
    for i, name in enumerate(called.modules(site.path)):
        tensors = f"{PREFIX}{name.rpartition('.')[0] if site.experts else name}"
        if site.experts and name.endswith(INNER) and f"{site.path.rpartition('/')[0]}/down_proj/{A.name}" in flat:
            tensors += ".base_layer"  # PEFT wraps the experts' module once for each parameter
        full = f"{name}.weight" if site.leaf == "router" else name
        own = site
        if len(site.shape) - site.stacked > 2 and not site.experts:
            own = site._replace(axes=_kernel_axes(site, flat, found.get(f"{tensors}.{A.peft}")))
        yield Module(full, own, i if site.stacked else None, tensors)


def _kernel_axes(site: Site, flat: Mapping[str, Any], lora_a: TensorInfo | None) -> tuple[int, int]:
    """How many axes of a kernel are inputs, and how many outputs.

    The file's A decides, then the tree's own adapter, or else the rule for a new one.
    """
    shape, outputs = site.shape[site.stacked :], site.axes[1]
    if lora_a is not None and lora_a.shape[1] != math.prod(shape[:-outputs]):
        sizes = [math.prod(shape[:count]) for count in range(1, len(shape))]
        outputs = len(shape) - 1 - sizes.index(lora_a.shape[1]) if lora_a.shape[1] in sizes else outputs
    elif f"{site.path}/{B.name}" in flat:
        outputs = flat[f"{site.path}/{B.name}"].ndim - 1 - site.stacked
    return len(shape) - outputs, outputs


def outermost(modules: list[Module], found: Mapping[str, TensorInfo], config: AdapterConfig) -> list[Module]:
    """The modules, with experts' tensors named as PEFT does if the file adapts both parameters or only one."""
    wanted = {module.name for module in modules if module.site.experts and is_wanted(module, found, config)}

    def rename(module: Module) -> Module:
        if not module.name.endswith(INNER) or not module.site.experts:
            return module
        outer = f"{module.name.rpartition('.')[0]}.down_proj"
        return module._replace(tensors=f"{module.tensors}.base_layer") if outer in wanted else module

    return [rename(module) for module in modules]


def is_wanted(module: Module, found: Mapping[str, TensorInfo], config: AdapterConfig) -> bool:
    """Whether the adapter in a file that holds the tensors `found` has factors for this module."""
    if module.is_parameter:
        return config.targets_parameter(module.name)
    wanted = config.targets(module.name, linear=module.site.leaf == "kernel")
    if wanted is None:  # left to PEFT's defaults, so the file decides
        return any(name in found for name, _, _ in module.tensors_of(config, 1).values())
    if wanted and module.site.leaf == "kernel" and config.ensure_weight_tying and is_head(module.path):
        return False  # the same adapter as the embedding's
    return wanted


# ---------------------------------------------------------------- the file's tensors


def factor_slots(adapted: list[Module], config: AdapterConfig) -> dict[str, Slot]:
    """Tensor name → slot, for what a config puts beside the adapted weights."""
    return {
        name: Slot(f"{module.path}/{leaf.name}", module.index, shape, codec)
        for module in adapted
        for leaf, (name, shape, codec) in module.tensors_of(config, config.rank(module.name)).items()
    }


def extra_slots(flat: Mapping[str, Any], wrapped: set[str]) -> dict[str, Slot]:
    """Tensor name → slot, for the trained copies and token rows that the tree holds.

    Args:
        wrapped: names of adapted modules, whose own leaves PEFT puts under "base_layer".
    """
    slots: dict[str, Slot] = {}
    called = AdapterNames(flat)
    for path, leaf in flat.items():
        module, _, name = path.rpartition("/")
        if COPIES.holds(name):
            slots |= _copy_slots(module, original(name), tuple(leaf.shape), wrapped, called)
        if name == ROWS.name:
            slots[_rows_name(module, called)] = Slot(path, None, tuple(leaf.shape), PLAIN)
    return slots


def _copy_slots(
    module: str, leaf: str, shape: tuple[int, ...], wrapped: set[str], called: AdapterNames
) -> dict[str, Slot]:
    slots = {}
    for tensor in called.tensors(module, leaf, shape):
        owner, _, last = tensor.name.rpartition(".")
        name = f"{owner}.base_layer.{last}" if owner in wrapped else tensor.name
        index = tensor.index[0] if tensor.index else None
        codec = TRANSPOSED if tensor.transposed else PLAIN
        slots[f"{PREFIX}{name}"] = Slot(copy_of(f"{module}/{leaf}"), index, tensor.shape, codec)
    return slots


def config_slots(leaves: Mapping[str, Any], config: AdapterConfig, adapted: list[Module]) -> dict[str, Slot]:
    """Tensor name → slot, for the trained copies and token rows that a config asks for."""
    slots: dict[str, Slot] = {}
    wrapped = {module.name for module in adapted}
    called = AdapterNames(leaves)
    for path, leaf in leaves.items():
        module, _, name = path.rpartition("/")
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        full = called.modules(module)
        saved = [config.saves(item) for item in full]
        biased = name == "bias" and (
            config.bias == "all" or (config.bias == "lora_only" and any(item in wrapped for item in full))
        )
        if any(saved) or biased:
            slots |= _copy_slots(module, name, tuple(leaf.shape), wrapped, called)
    pair = tie(leaves)
    if pair and pair.tied and config.saves(pair.head) and not config.ensure_weight_tying:
        slots |= _copy_slots(pair.head, "kernel", leaves[pair.weight].shape[::-1], wrapped, called)
    if pair and config.saves(SCORE) and KERNEL not in leaves and tree.is_own(leaves):
        slots |= _copy_slots(SCORE, "kernel", (leaves[pair.weight].shape[1], 1), wrapped, called)
    return slots | {
        _rows_name(module, called): Slot(f"{module}/{ROWS.name}", None, (len(tokens), width), PLAIN)
        for module, (tokens, width) in token_modules(leaves, config, called).items()
    }


def _rows_name(module: str, called: AdapterNames) -> str:
    """The name of the tensor with a module's new rows for tokens."""
    return f"{PREFIX}{called.modules(module)[0]}.{ROWS.peft}"


def token_modules(
    leaves: Mapping[str, Any], config: AdapterConfig, called: AdapterNames
) -> dict[str, tuple[Sequence[int], int]]:
    """Module → (the tokens whose rows the adapter replaces there, the length of a row).

    Raises:
        UserError: the config names a module without rows of tokens.
    """
    found: dict[str, tuple[Sequence[int], int]] = {}
    for item, tokens in config.token_rows(input_embedding(leaves)).items():
        for module in called.only(item):
            for name in {"kernel", "embedding"} & {path.removeprefix(f"{module}/") for path in leaves}:
                shape = leaves[f"{module}/{name}"].shape
                if len(shape) != 2 or called.stack_of(module):
                    raise UserError(
                        f"{CONFIG}: trainable_token_indices names {item!r}, which is {module}/{name} {tuple(shape)}: "
                        "only an embedding and a head have rows of tokens"
                    )
                found[module] = tokens, shape[1] if name == "embedding" else shape[0]
    return found


def input_embedding(leaves: Mapping[str, Any]) -> str:
    """The last part of the input embedding's name; "" for trees without one under a known name."""
    pair = tie(leaves)
    return pair.embedding.split("/")[-1] if pair else ""


def read_slots(
    file: Path, slots: Mapping[str, Slot], made: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Tensor name → its float32 values in the tree's layout.

    Args:
        made: values, in the file's layout, of tensors that are made rather than read from the file.

    Raises:
        UserError: some values are not finite; the first such tensors are named, with their counts.
    """
    made = {name: value for name, value in (made or {}).items() if name in slots}
    require_finite({f"{file}: {name}": value for name, value in made.items()})
    raw = read_tensors(file, [name for name in slots if name not in made]) | made
    return {name: slot.codec.from_file(raw[name].astype(np.float32)) for name, slot in slots.items()}


def check_fits(
    file: Path,
    found: Mapping[str, TensorInfo],
    slots: Mapping[str, Slot],
    optional: set[str],
    modules: list[Module],
    prefix: str = PREFIX,
) -> None:
    """Checks that the file holds all tensors of `slots`, and no others but those that are `optional`.

    Args:
        prefix: the beginning of every tensor's name.

    Raises:
        ValueError: tensors are missing, unknown or misshapen; all are listed.
    """
    _require_plain_names(file, found)
    problems = [f"missing {name} {slot.shape}" for name, slot in slots.items() if name not in found]
    problems += [
        f"{name} has shape {found[name].shape}, expected {slot.shape}{_labels(slot)}"
        for name, slot in slots.items()
        if name in found and found[name].shape != slot.shape
    ]
    problems += [
        f"{name} is {found[name].dtype}, expected one of {', '.join(sorted(DTYPES))}"
        for name in slots
        if name in found and found[name].dtype not in DTYPES
    ]
    there = {module.tensors for module in modules}
    problems += [
        f"unknown {name} {info.shape}{_why(name, there, prefix)}"
        for name, info in found.items()
        if name not in slots and name not in optional
    ]
    if not slots and not problems:
        problems.append("target_modules match no linear of the model")
    if problems:
        raise UserError(describe_faults(f"{file} does not fit the model; nothing was loaded", sorted(problems)))


def _require_plain_names(file: Path, found: Mapping[str, TensorInfo]) -> None:
    """Checks that no tensor's name contains a wrapper's.

    Raises:
        UserError: some do; their number is given, and the first is named.
    """
    for mark, why in MARKS.items():
        if marked := [name for name in found if re.search(mark, name)]:
            raise UserError(
                f"{file}: in {len(marked)} of {number_of(len(found), 'name')}, there is a part that {why}, such as "
                f"{marked[0]}; PEFT does not read such names either. Save the adapter with PEFT's save_pretrained on "
                f"the unwrapped model, or take that part out of the names"
            )


def _labels(slot: Slot) -> str:
    return ": score heads have one label here (num_labels=1)" if slot.path.startswith(f"{SCORE}/") else ""


def _why(tensor: str, there: set[str], prefix: str) -> str:
    if not tensor.startswith(prefix):
        return f": PEFT's names begin with {prefix!r}"
    module = re.sub(rf"\.(({'|'.join(BEGINNINGS)})_.*|m)$", "", tensor)
    if module in there:
        return f": {CONFIG} does not target this module"
    name = module.removeprefix(prefix)
    if any(family.half and family.half.is_other(f"{name}.weight") for family in FAMILIES.values()):
        return ": it belongs to a part beside the language model, which is not trained here"
    return ": the model has no such linear"


def optional_tensors(
    file: Path, found: Mapping[str, TensorInfo], leaves: Mapping[str, Any], modules: list[Module]
) -> set[str]:
    """Tensors that repeat the base's embedding or head; PEFT writes them beside the adapters of these."""
    copies = set()
    for module in modules:
        name = f"{module.tensors}.base_layer.weight"
        if name not in found or module.index is not None:
            continue
        weight = base_weight(leaves, module)
        if weight is None or found[name].shape != weight.shape:
            continue
        values = read_tensor(file, name).astype(np.float32)
        if np.allclose(np.asarray(weight, np.float32), values, rtol=0.01, atol=1e-6):
            copies.add(name)
    return copies


def base_weight(leaves: Mapping[str, Any], module: Module) -> Any:
    """The base's weight of an embedding or head, in the Hub's layout [V, D]; None if it is packed."""
    if module.site.tied_to:
        return leaves[f"{module.site.tied_to}/embedding"]
    weight = leaves[f"{module.path}/{module.site.leaf}"]
    if quant.is_packed(weight):
        return None
    return weight if module.site.leaf == "embedding" else weight.T
