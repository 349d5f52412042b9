"""PEFT's adapters other than LoRA that change a linear's weight by a fixed matrix: (IA)³, LoHa, LoKr and VeRA.

They are read, not trained: `jlora.hub.peft.conversion` turns the changes into LoRA.
"""

import dataclasses
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jlora.errors import UserError
from jlora.hub.peft.config import AdapterConfig
from jlora.hub.peft.fields import wrong_fields
from jlora.hub.peft.slots import Module
from jlora.lora.kinds import update_of
from jlora.lora.low_rank import Change

Shapes = dict[str, tuple[int, ...]]
Tensors = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Method:
    """An adapter method with the settings of one file.

    Attributes:
        config: the modules it adapts, with ranks and alphas if the method has them.
    """

    config: AdapterConfig

    def shapes(self, module: Module) -> Shapes:
        """End of the name → shape, for every tensor of one module."""
        raise NotImplementedError

    def shared_shapes(self, adapted: Sequence[Module], found: Mapping[str, Any]) -> Shapes:
        """Whole name → shape, for the tensors that all modules share."""
        return {}

    def shared(self, adapted: Sequence[Module], read: Tensors) -> Tensors:
        """The values that all modules share, by the names that `change` uses."""
        return {}

    def change(self, module: Module, tensors: Tensors, shared: Tensors, weight: np.ndarray | None) -> Change:
        """What one module adds to its kernel.

        Args:
            tensors: the module's tensors by the ends of their names.
            shared: what `shared` returned.
            weight: the base's weight in float32 [D, N], if `needs_weight`.
        """
        raise NotImplementedError

    @property
    def needs_weight(self) -> bool:
        return False

    def output_scale(self, module: Module, tensors: Tensors) -> np.ndarray | None:
        """The factors [N] by which the method multiplies the linear's output, bias included; None if it does not."""
        return None


class LoHa(Method):
    """ΔW = alpha/r · (A₁B₁) ⊙ (A₂B₂), a Hadamard product (FedPara, Hyeon-Woo et al. 2022; LyCORIS)."""

    def shapes(self, module: Module) -> Shapes:
        rank = self.config.rank(module.name)
        a, b = (module.site.outputs, rank), (rank, module.site.inputs)
        return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}

    def change(self, module: Module, tensors: Tensors, shared: Tensors, weight: np.ndarray | None) -> Change:
        """The change; the product of two matrices of rank r has rank r², and factors that multiply pairs of columns."""
        scale = np.float32(self.config.scale(module.name))
        if self.config.rank(module.name) ** 2 >= min(module.site.inputs, module.site.outputs):
            first, second = (tensors[f"hada_w{i}_a"] @ tensors[f"hada_w{i}_b"] for i in (1, 2))
            return Change((first * second).T * scale)
        left = np.einsum("kd,ld->dkl", tensors["hada_w1_b"], tensors["hada_w2_b"]).reshape(module.site.inputs, -1)
        right = np.einsum("nk,nl->kln", tensors["hada_w1_a"], tensors["hada_w2_a"]).reshape(-1, module.site.outputs)
        return Change(left, right * scale)


@dataclasses.dataclass(frozen=True)
class LoKr(Method):
    """ΔW = alpha/r · W₁ ⊗ W₂, a Kronecker product whose parts may be products themselves (LyCORIS, Yeh et al. 2024)."""

    decompose_both: bool
    decompose_factor: int

    def shapes(self, module: Module) -> Shapes:
        rank = self.config.rank(module.name)
        (in1, in2), (out1, out2) = (
            factor_pair(n, self.decompose_factor) for n in (module.site.inputs, module.site.outputs)
        )
        shapes: Shapes = {}
        if self.decompose_both and rank < max(in1, out1) / 2:
            shapes |= {"lokr_w1_a": (out1, rank), "lokr_w1_b": (rank, in1)}
        else:
            shapes["lokr_w1"] = (out1, in1)
        if rank < max(in2, out2) / 2:
            shapes |= {"lokr_w2_a": (out2, rank), "lokr_w2_b": (rank, in2)}
        else:
            shapes["lokr_w2"] = (out2, in2)
        return shapes

    def change(self, module: Module, tensors: Tensors, shared: Tensors, weight: np.ndarray | None) -> Change:
        scale = np.float32(self.config.scale(module.name))
        first = tensors["lokr_w1"] if "lokr_w1" in tensors else tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
        if "lokr_w2" in tensors:
            return Change(np.kron(first, tensors["lokr_w2"]).T * scale)
        # W₁ ⊗ (A₂B₂) = (W₁ ⊗ A₂)(1 ⊗ B₂)
        left = np.kron(np.eye(first.shape[1], dtype=np.float32), tensors["lokr_w2_b"]).T
        return Change(left, np.kron(first, tensors["lokr_w2_a"]).T * scale)


@dataclasses.dataclass(frozen=True)
class VeRA(Method):
    """ΔW = diag(b) B diag(d) A, where all modules share the random A and B (Kopiczko et al. 2024)."""

    save_projection: bool
    projection_prng_key: int

    def shapes(self, module: Module) -> Shapes:
        return {"vera_lambda_b": (module.site.outputs,), "vera_lambda_d": (self.config.r,)}

    def shared_shapes(self, adapted: Sequence[Module], found: Mapping[str, Any]) -> Shapes:
        if not self.save_projection and not any(name in found for name in ("base_model.vera_A", "base_model.vera_B")):
            return {}
        return dict(zip(("base_model.vera_A", "base_model.vera_B"), self._projections(adapted), strict=True))

    def shared(self, adapted: Sequence[Module], read: Tensors) -> Tensors:
        if read:
            return {name.removeprefix("base_model."): value for name, value in read.items()}
        values = _torch_kaiming(self._projections(adapted), self.projection_prng_key)
        return dict(zip(("vera_A", "vera_B"), values, strict=True))

    def change(self, module: Module, tensors: Tensors, shared: Tensors, weight: np.ndarray | None) -> Change:
        left = shared["vera_A"][:, : module.site.inputs].T * tensors["vera_lambda_d"]
        return Change(left, (shared["vera_B"][: module.site.outputs] * tensors["vera_lambda_b"][:, None]).T)

    def _projections(self, adapted: Sequence[Module]) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shapes of A and B, as large as the largest module needs."""
        inputs, outputs = (max((getattr(m.site, side) for m in adapted), default=0) for side in ("inputs", "outputs"))
        return (self.config.r, inputs), (outputs, self.config.r)


@dataclasses.dataclass(frozen=True)
class IA3(Method):
    """Scales a linear's output, or a feedforward module's input, by l (Liu et al. 2022): ΔW = W · (l - 1)."""

    feedforward_modules: str | tuple[str, ...]

    def shapes(self, module: Module) -> Shapes:
        return {"ia3_l": (1, module.site.inputs) if self._scales_input(module) else (module.site.outputs, 1)}

    def change(self, module: Module, tensors: Tensors, shared: Tensors, weight: np.ndarray | None) -> Change:
        assert weight is not None
        factor = tensors["ia3_l"].reshape(-1) - 1
        return Change(weight * (factor[:, None] if self._scales_input(module) else factor[None, :]))

    @property
    def needs_weight(self) -> bool:
        return True

    def output_scale(self, module: Module, tensors: Tensors) -> np.ndarray | None:
        return None if self._scales_input(module) else tensors["ia3_l"].reshape(-1)

    def _scales_input(self, module: Module) -> bool:
        """PEFT's rule: a regular expression of the whole name, or a list of its endings, which may begin mid-word."""
        if isinstance(self.feedforward_modules, str):
            return re.fullmatch(self.feedforward_modules, module.name) is not None
        return module.name.endswith(self.feedforward_modules)


METHODS = ("IA3", "LOHA", "LOKR", "VERA")
# Fields that all methods have: those that decide where the adapter acts, and those that do not matter here.
_COMMON = (
    *("target_modules", "exclude_modules", "layers_to_transform", "modules_to_save", "peft_type", "auto_mapping"),
    *("base_model_name_or_path", "fan_in_fan_out", "inference_mode", "layers_pattern", "peft_version", "revision"),
    *("task_type", "runtime_config"),
)
# `use_effective_conv2d` is about convolutions, whose tensors would be reported as unknown.
_LYCORIS = (
    *("r", "alpha", "rank_pattern", "alpha_pattern", "rank_dropout", "module_dropout", "init_weights"),
    "use_effective_conv2d",
)
_FIELDS = {
    "IA3": ("feedforward_modules", "init_ia3_weights"),
    "LOHA": _LYCORIS,
    "LOKR": (*_LYCORIS, "decompose_both", "decompose_factor", "rank_dropout_scale"),
    "VERA": ("r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights", "bias"),
}


def open_method(fields: Mapping[str, Any], path: Path) -> Method:
    """The method that an adapter_config.json describes.

    Raises:
        ValueError: fields are missing, malformed, or ask for something that is not converted; all are listed.
    """
    problems = _problems(fields)
    if problems:
        raise UserError(f"{path} cannot be converted:\n  " + "\n  ".join(problems))
    kind = fields["peft_type"]
    unknown = sorted(name for name, value in fields.items() if name not in (*_COMMON, *_FIELDS[kind]) and value)
    if unknown:
        warnings.warn(f"{path}: fields that jlora does not know are ignored: {', '.join(unknown)}", stacklevel=3)
    config = _adapter_config(fields)
    match kind:
        case "LOHA":
            return LoHa(config)
        case "LOKR":
            return LoKr(config, bool(fields.get("decompose_both")), fields.get("decompose_factor", -1))
        case "VERA":
            return VeRA(config, fields.get("save_projection", True), fields.get("projection_prng_key", 0))
    forward = fields["feedforward_modules"]
    return IA3(config, forward if isinstance(forward, str) else tuple(forward))


def factor_pair(size: int, factor: int) -> tuple[int, int]:
    """The two factors of `size` that LoKr uses.

    They are `factor` and `size // factor` if that divides `size`, else the pair nearest to the square root whose
    smaller number is at most `factor` (-1: any).
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    largest = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    small = next((n for n in range(largest, 0, -1) if size % n == 0), 1)
    return small, size // small


def _adapter_config(fields: Mapping[str, Any]) -> AdapterConfig:
    layers = fields.get("layers_to_transform")
    targets, excluded = (
        tuple(value) if isinstance(value, list) else value
        for value in (fields.get("target_modules"), fields.get("exclude_modules"))
    )
    return AdapterConfig(
        r=fields.get("r", 1),
        lora_alpha=fields.get("alpha", 1),
        target_modules=targets,
        exclude_modules=excluded,
        layers_to_transform=(layers,) if isinstance(layers, int) else tuple(layers) if layers else None,
        rank_pattern=dict(fields.get("rank_pattern") or {}),
        alpha_pattern=dict(fields.get("alpha_pattern") or {}),
        modules_to_save=tuple(fields.get("modules_to_save") or ()),
    )


def _problems(fields: Mapping[str, Any]) -> list[str]:
    kind = fields.get("peft_type")
    if update_of(kind) is not None:
        return ["it needs no conversion: open it with jlora.load_adapter"]
    if not isinstance(kind, str) or kind not in METHODS:
        return [f"peft_type is {kind!r}; {', '.join(METHODS)} can be converted"]
    problems = []
    problems += wrong_fields(fields, {"IA3": (), "VERA": ("r",)}.get(kind, ("r", "alpha")))
    for name in ("decompose_factor", "projection_prng_key"):
        if not isinstance(fields.get(name, 0), int):
            problems.append(f"{name} is {fields[name]!r}; expected an integer")
    if fields.get("bias") not in (None, "none"):
        problems.append(f"bias={fields['bias']!r} is not supported: trained biases are not a low-rank update")
    if kind == "IA3" and not isinstance(fields.get("feedforward_modules"), str | list):
        problems.append("feedforward_modules is missing: without it, (IA)³ may scale a module's input or its output")
    return problems


def _torch_kaiming(shapes: tuple[tuple[int, int], ...], seed: int) -> list[np.ndarray]:
    """Uniform in ±√(6 / columns), drawn as torch draws on a CPU, which recovers matrices that a file leaves out.

    torch's generator is the Mersenne twister, seeded with the seed's low 32 bits; a float32 takes 24 bits of each
    draw, and is scaled with a single rounding.
    """
    generator = np.random.RandomState(seed & 0xFFFFFFFF)
    drawn = []
    for shape in shapes:
        bits = generator.randint(0, 2**32, size=shape, dtype=np.uint32) & np.uint32(2**24 - 1)
        low, high = (np.float32(sign * math.sqrt(3) * (math.sqrt(2) / math.sqrt(shape[1]))) for sign in (-1, 1))
        drawn.append((bits / 2.0**24 * np.float64(high - low) + np.float64(low)).astype(np.float32))
    return drawn
