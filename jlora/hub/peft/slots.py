"""The layout of PEFT's files: the modules that can be adapted, and a slot of the tree for each tensor."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jlora import lora, quant, tree
from jlora.errors import UserError, describe_faults
from jlora.hub.checkpoints import names
from jlora.hub.checkpoints.score import KERNEL
from jlora.hub.checkpoints.weights import DTYPES, TensorInfo, read_tensor, read_unchecked, require_finite
from jlora.hub.peft.config import CONFIG, AdapterConfig
from jlora.hub.peft.names import AdapterNames
from jlora.lora.merging import MAIN, TIED_HEADS, tied_heads
from jlora.lora.partition import TRAINED
from jlora.lora.targets import split_axes
from jlora.models.model import SCORE
from jlora.types import Params

PREFIX = "base_model.model."
# Parts of names that occur only in a model in memory → where they come from.
MARKS = {
    r"(^|\.)_orig_mod\.": "torch.compile puts there (_orig_mod)",
    r"(^|\.)_fsdp_wrapped_module\.": "FSDP puts there (_fsdp_wrapped_module)",
    r"^module\.": "DistributedDataParallel puts there (module)",
    r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|modules_to_save)\.[^.]+(\.weight|\.bias)$"
    r"|\.(lora_embedding_[AB])\.[^.]+$": "is the adapter's name in memory",
}


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
    """One adaptable module of one layer, as PEFT sees it.

    Attributes:
        name: PEFT's name of the module, or of the parameter ("….experts.down_proj", "….gate.weight").
        path, index: its place in the tree: the module, and the layer's index in its stack (None if not stacked).
        leaf: "kernel", "embedding" or "router".
        inputs, outputs: the sizes, of one expert if there are several; products for kernels with more axes.
        experts: the number of experts, 0 for a plain module.
        tensors: the beginning of its tensors' names.
        kernel: (input axes, output axes) of a kernel that is not a matrix, as models other than language models have;
            in the file it is one.
        exchanged: whether the file has A and B the other way round (see `peft_experts`).
    """

    name: str
    path: str
    index: int | None
    leaf: str
    inputs: int
    outputs: int
    experts: int
    tensors: str
    kernel: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    exchanged: bool = False

    @property
    def is_parameter(self) -> bool:
        return self.experts > 0 or self.leaf == "router"

    def factors(self, rank: int) -> dict[str, tuple[str, tuple[int, ...], Codec]]:
        """Leaf → (tensor name, its shape, codec), for A and B."""
        if self.leaf == "embedding":
            ends = (".lora_embedding_A", ".lora_embedding_B")
        else:
            ends = (".lora_A.weight", ".lora_B.weight")
        a, b = _expert_codecs(self.experts) if self.experts else (TRANSPOSED, TRANSPOSED)
        if self.kernel:
            a, b = _flat_codecs(*self.kernel)
        wide = rank * max(1, self.experts)
        if self.exchanged:
            a, b = _exchanged_codecs(self.experts)
            return {
                "lora_a": (self.tensors + ends[1], (self.inputs, wide), a),
                "lora_b": (self.tensors + ends[0], (wide, self.outputs), b),
            }
        return {
            "lora_a": (self.tensors + ends[0], (wide, self.inputs), a),
            "lora_b": (self.tensors + ends[1], (self.outputs, wide), b),
        }

    def used(self, leaf: str, value: np.ndarray, rank: int) -> np.ndarray:
        """The first `rank` columns of one layer's A, or rows of its B; the others are padding."""
        if leaf == "lora_a":
            return value[..., :rank]
        return value[:rank] if self.kernel else value[..., :rank, :]

    def padded(self, leaf: str, value: np.ndarray, rank: int) -> np.ndarray:
        """A value that `used` returned, zero-padded to `rank`."""
        axis = -1 if leaf == "lora_a" else 0 if self.kernel else -2
        widths = [(0, 0)] * value.ndim
        widths[axis] = (0, rank - value.shape[axis])
        return np.pad(value, widths)


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
    every = tree.flatten(params)
    called = AdapterNames(every)
    flat = {path: leaf for path, leaf in every.items() if not lora.is_adapter(path)}
    modules = []
    for path, leaf in flat.items():
        module, _, name = path.rpartition("/")
        if name in MAIN and leaf.ndim > 1:
            modules += _module_layers(module, name, every, found or {}, called)
    for embedding, head in tied_heads(flat).items():
        shape = flat[f"{embedding}/embedding"].shape
        modules.append(Module(head, head, None, "kernel", shape[1], shape[0], 0, PREFIX + head))
    return modules


def _module_layers(
    path: str, leaf: str, flat: Mapping[str, Any], found: Mapping[str, TensorInfo], called: AdapterNames
) -> list[Module]:
    shape = tuple(flat[f"{path}/{leaf}"].shape)
    stacked = called.stack_of(path) is not None
    is_expert = stacked and re.fullmatch(names.EXPERTS, path) is not None
    layers = []
    for i, name in enumerate(called.modules(path)):
        tensors = f"{PREFIX}{name.rpartition('.')[0] if is_expert else name}"
        if is_expert and name.endswith("gate_up_proj") and f"{path.rpartition('/')[0]}/down_proj/lora_a" in flat:
            tensors += ".base_layer"  # PEFT wraps the experts' module once for each parameter
        full = f"{name}.weight" if leaf == "router" else name
        own = shape[1:] if stacked else shape
        experts = own[0] if is_expert else 0
        kernel = None
        if len(own) > 2 and not is_expert:
            kernel = _kernel_axes(path, own, flat, found.get(f"{tensors}.lora_A.weight"), stacked)
            own = tuple(map(math.prod, kernel))
        layers.append(Module(full, path, i if stacked else None, leaf, own[-2], own[-1], experts, tensors, kernel))
    return layers


def _kernel_axes(
    path: str, shape: tuple[int, ...], flat: Mapping[str, Any], lora_a: TensorInfo | None, stacked: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(input axes, output axes) of a kernel, by the file's A, the tree's own adapter, or else the bias."""
    bias = flat.get(f"{path}/bias")
    _, outputs = split_axes(path, (1,) * stacked + shape, None if bias is None else bias.ndim, stacked=stacked)
    if lora_a is not None and lora_a.shape[1] != math.prod(shape[:-outputs]):
        sizes = [math.prod(shape[:count]) for count in range(1, len(shape))]
        outputs = len(shape) - 1 - sizes.index(lora_a.shape[1]) if lora_a.shape[1] in sizes else outputs
    elif f"{path}/lora_b" in flat:
        outputs = flat[f"{path}/lora_b"].ndim - 1 - stacked
    return shape[:-outputs], shape[-outputs:]


def outermost(modules: list[Module], found: Mapping[str, TensorInfo], config: AdapterConfig) -> list[Module]:
    """The modules, with experts' tensors named as PEFT does if the file adapts both parameters or only one."""
    wanted = {module.name for module in modules if module.experts and is_wanted(module, found, config)}

    def rename(module: Module) -> Module:
        if not module.name.endswith(".gate_up_proj") or not module.experts:
            return module
        outer = module.name.removesuffix("gate_up_proj") + "down_proj"
        return module._replace(tensors=f"{module.tensors}.base_layer") if outer in wanted else module

    return [rename(module) for module in modules]


def is_wanted(module: Module, found: Mapping[str, TensorInfo], config: AdapterConfig) -> bool:
    """Whether the adapter in a file that holds the tensors `found` has factors for this module."""
    if module.is_parameter:
        return config.targets_parameter(module.name)
    wanted = config.targets(module.name, linear=module.leaf == "kernel")
    if wanted is None:  # left to PEFT's defaults, so the file decides
        return any(name in found for name, _, _ in module.factors(1).values())
    if wanted and module.path in TIED_HEADS.values() and config.ensure_weight_tying:
        return False  # the same adapter as the embedding's
    return wanted


# ---------------------------------------------------------------- the file's tensors


def factor_slots(adapted: list[Module], config: AdapterConfig) -> dict[str, Slot]:
    """Tensor name → slot, for the factors and what DoRA and biases add to them."""
    slots = {}
    for module in adapted:
        for leaf, (name, shape, codec) in module.factors(config.rank(module.name)).items():
            slots[name] = Slot(f"{module.path}/{leaf}", module.index, shape, codec)
        if config.use_dora:
            name = f"{module.tensors}.lora_magnitude_vector"
            slots[name] = Slot(f"{module.path}/lora_magnitude", module.index, (module.outputs,), PLAIN)
        if config.lora_bias:
            name = f"{module.tensors}.lora_B.bias"
            slots[name] = Slot(f"{module.path}/lora_bias", module.index, (module.outputs,), PLAIN)
    return slots


def extra_slots(flat: Mapping[str, Any], wrapped: set[str]) -> dict[str, Slot]:
    """Tensor name → slot, for the trained copies and token rows that the tree holds.

    Args:
        wrapped: names of adapted modules, whose own leaves PEFT puts under "base_layer".
    """
    slots: dict[str, Slot] = {}
    called = AdapterNames(flat)
    for path, leaf in flat.items():
        module, _, name = path.rpartition("/")
        if name.startswith(TRAINED):
            slots |= _copy_slots(module, name.removeprefix(TRAINED), tuple(leaf.shape), wrapped, called)
        if name == "lora_tokens":
            tensor = f"{PREFIX}{called.modules(module)[0]}.token_adapter.trainable_tokens_delta"
            slots[tensor] = Slot(path, None, tuple(leaf.shape), PLAIN)
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
        slots[f"{PREFIX}{name}"] = Slot(f"{module}/{TRAINED}{leaf}", index, tensor.shape, codec)
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
    for embedding, head in tied_heads(leaves).items():
        if config.saves(head) and not config.ensure_weight_tying:
            slots |= _copy_slots(head, "kernel", leaves[f"{embedding}/embedding"].shape[::-1], wrapped, called)
    if config.saves(SCORE) and KERNEL not in leaves and tree.is_own(leaves) and (width := _width(leaves)):
        slots |= _copy_slots(SCORE, "kernel", (width, 1), wrapped, called)
    return slots | {
        f"{PREFIX}{called.modules(module)[0]}.token_adapter.trainable_tokens_delta": Slot(
            f"{module}/lora_tokens", None, (len(tokens), width), PLAIN
        )
        for module, (tokens, width) in token_modules(leaves, config, called).items()
    }


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
    return next((path.split("/")[-1] for path in TIED_HEADS if f"{path}/embedding" in leaves), "")


def _width(leaves: Mapping[str, Any]) -> int:
    """The hidden states' size, from the input embedding; 0 for trees without one."""
    return next((leaves[f"{path}/embedding"].shape[1] for path in TIED_HEADS if f"{path}/embedding" in leaves), 0)


def read_slots(
    file: Path, slots: Mapping[str, Slot], made: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Tensor name → its float32 values in the tree's layout.

    Args:
        made: values, in the file's layout, of tensors that are made rather than read from the file.

    Raises:
        UserError: some values are not finite; the first such tensors are named, with their counts.
    """
    raw = {name: made[name] if made and name in made else read_unchecked(file, name) for name in slots}
    require_finite({f"{file}: {name}": value for name, value in raw.items()})
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
                f"{file}: {len(marked)} of {len(found)} tensors have a part in their names that {why}, such as "
                f"{marked[0]}; PEFT reads no such names either. Save the adapter with PEFT's save_pretrained on the "
                f"unwrapped model, or take that part out of the names"
            )


def _labels(slot: Slot) -> str:
    return ": score heads have one label here (num_labels=1)" if slot.path.startswith(f"{SCORE}/") else ""


def _why(tensor: str, there: set[str], prefix: str) -> str:
    if not tensor.startswith(prefix):
        return f": PEFT's names begin with {prefix!r}"
    module = re.sub(r"\.((lora|hada|lokr|ia3|vera)_.*|m)$", "", tensor)
    return f": {CONFIG} does not target this module" if module in there else ": the model has no such linear"


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
    for embedding, head in tied_heads(leaves).items():
        if module.path == head:
            return leaves[f"{embedding}/embedding"]
    weight = leaves[f"{module.path}/{module.leaf}"]
    if quant.is_packed(weight):
        return None
    return weight if module.leaf == "embedding" else weight.T
