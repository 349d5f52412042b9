"""What to adapt and how, under PEFT's field names."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from jlora.errors import UserError

# Initialisations that draw random numbers, and those computed from base weights ("pissa_niter_4" is a quicker "pissa").
DRAWN = (True, False, "default", "gaussian", "zero_a", "orthogonal")
FROM_WEIGHTS = r"pissa(_niter_\d+)?|olora|loftq|lora_ga"
FROM_DATA = ("eva", "lora_ga")
DIRECTIONS, SCALES = ("ArBr", "A2rBr", "ArB2r"), ("stable", "gd_scale", "weight_svd")
BIASES = ("none", "all", "lora_only")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The settings of `peft.LoraConfig` that jlora supports, with PEFT's meaning.

    Attributes:
        r: rank of the update.
        lora_alpha: the update is scaled by lora_alpha / r, or by lora_alpha / sqrt(r) with `use_rslora`.
        target_modules: "all-linear" (every linear but the head), a sequence of names (a module matches when its dotted
            name is one of them or ends in "." + one of them), or one regular expression for the full dotted name.
            Embeddings and the head can be named too. An embedding that is also the head has one adapter, which acts in
            both places.
        exclude_modules: modules to leave out, in the same forms.
        lora_dropout: probability of dropping an input of the update in training; never applied to the head or to
            embeddings.
        use_rslora: divide `lora_alpha` by sqrt(r) rather than by r (rank-stabilised LoRA, Kalajdzievski 2023).
        rank_pattern: (name or regular expression) → rank of the modules whose name ends in a match.
        alpha_pattern: (name or regular expression) → `lora_alpha` of the modules whose name ends in a match.
        init_lora_weights: True or "default": A uniform in ±1/sqrt(in), B zero (embeddings: A zero, B normal).
            "gaussian": A normal with deviation 1/r, B zero. "zero_a": A zero, B uniform in ±1/sqrt(r). False: both
            random, so training does not start from the base model. "orthogonal": both random, their product zero.
            "pissa", "pissa_niter_N", "olora": the base's leading singular vectors ("olora": its QR factors), whose
            product is subtracted from the base. "loftq": what packing the base lost; `init` needs the unpacked base.
            "eva": the directions in which the inputs vary, with ranks shared out by variance; `init` needs `moments`.
            "lora_ga": the leading singular vectors of the kernels' gradients; `init` needs `gradients`.
        use_dora: also train the length of every output's weights (DoRA).
        lora_bias: give the update a bias as well.
        bias: "none", or train copies of the biases: "all" of them, or with "lora_only" those of adapted modules.
        modules_to_save: names; modules whose dotted name ends in one of them are trained whole, as copies.
        layers_to_transform: adapt these layers only; needs `target_modules` to be a sequence.
        trainable_token_indices: tokens whose embeddings are trained as new rows: a sequence for the input embedding
            (and its tied head), or (module name → tokens).
        target_parameters: experts' kernels and routers to adapt, by the ends of their dotted names
            ("mlp.experts.down_proj", "gate.weight").
        eva_rho: no module's rank grows beyond this many times the rank asked for (PEFT's `eva_config.rho`).
        lora_ga_direction: which singular vectors "lora_ga" gives A and B: "ArBr", "A2rBr" or "ArB2r" (PEFT's
            `lora_ga_config.direction`).
        lora_ga_scale: how "lora_ga" scales them: "stable", "gd_scale" or "weight_svd" (PEFT's `lora_ga_config.scale`).
        lora_ga_gamma: the scale "stable" divides B by the root of this (PEFT's `lora_ga_config.stable_gamma`).
        peft_type: the kind of update, by PEFT's name for it: "LORA", or "MISS" (all shards of the inputs share one
            matrix).

    Raises:
        ValueError: settings are invalid or do not go together; all are listed.
    """

    r: int = 8
    lora_alpha: int | float = 8
    target_modules: str | Sequence[str] = "all-linear"
    exclude_modules: str | Sequence[str] | None = None
    lora_dropout: int | float = 0.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] | tuple[tuple[str, int], ...] = ()
    alpha_pattern: Mapping[str, int | float] | tuple[tuple[str, int | float], ...] = ()
    init_lora_weights: bool | str = True
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    trainable_token_indices: (
        Sequence[int] | Mapping[str, Sequence[int]] | tuple[tuple[str, Sequence[int]], ...] | None
    ) = None
    target_parameters: Sequence[str] | None = None
    eva_rho: float = 2.0
    lora_ga_direction: str = "ArB2r"
    lora_ga_scale: str = "stable"
    lora_ga_gamma: float = 16.0
    peft_type: str = "LORA"

    def __post_init__(self) -> None:
        # Make every field hashable, whatever it was given as.
        for name in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, _pairs(getattr(self, name)))
        layers = self.layers_to_transform
        if layers is not None:
            object.__setattr__(self, "layers_to_transform", (layers,) if isinstance(layers, int) else tuple(layers))
        tokens = self.trainable_token_indices
        if tokens is not None:
            tokens = tokens.items() if isinstance(tokens, Mapping) else tokens
            tokens = tuple(item if isinstance(item, int) else (item[0], tuple(item[1])) for item in tokens)
            object.__setattr__(self, "trainable_token_indices", tokens)
        if problems := self._problems():
            raise UserError("LoraConfig:\n  " + "\n  ".join(problems))

    def _problems(self) -> list[str]:
        problems = []
        if self.r < 1:
            problems.append(f"r={self.r}: expected a positive integer")
        if not 0 <= self.lora_dropout < 1:
            problems.append(f"lora_dropout={self.lora_dropout}: expected a probability in [0, 1)")
        start = self.init_lora_weights
        if start not in (*DRAWN, "eva") and not (isinstance(start, str) and re.fullmatch(FROM_WEIGHTS, start)):
            known = (*DRAWN, "pissa", "pissa_niter_N", "olora", "loftq", "eva", "lora_ga")
            problems.append(f"init_lora_weights={start!r}: expected one of {known}")
        if start == "orthogonal" and any(rank % 2 for rank in (self.r, *(rank for _, rank in self.rank_pattern))):
            problems.append("init_lora_weights='orthogonal' needs even ranks")
        if self.lora_ga_direction not in DIRECTIONS:
            problems.append(f"lora_ga_direction={self.lora_ga_direction!r}: expected one of {DIRECTIONS}")
        if self.lora_ga_scale not in SCALES:
            problems.append(f"lora_ga_scale={self.lora_ga_scale!r}: expected one of {SCALES}")
        if self.eva_rho < 1 or self.lora_ga_gamma <= 0:
            problems.append("eva_rho must be at least 1, and lora_ga_gamma positive")
        if self.bias not in BIASES:
            problems.append(f"bias={self.bias!r}: expected one of {BIASES}")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            problems.append("layers_to_transform needs target_modules to be a sequence of names")
        if self.target_parameters and (self.lora_dropout or self.use_dora or self.lora_bias):
            problems.append("target_parameters goes with neither lora_dropout, use_dora nor lora_bias (as in PEFT)")
        if self.use_dora and self.lora_bias:
            problems.append("use_dora does not go with lora_bias (as in PEFT)")
        problems += [
            f"rank_pattern {name!r}: rank {rank} is not positive" for name, rank in self.rank_pattern if rank < 1
        ]
        patterns = [name for name, _ in (*self.rank_pattern, *self.alpha_pattern)]
        patterns += [value for value in (self.target_modules, self.exclude_modules) if isinstance(value, str)]
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                problems.append(f"{pattern!r} is not a regular expression: {error}")
        return problems


def _pairs(pattern: Mapping | tuple) -> tuple:
    return tuple(pattern.items()) if isinstance(pattern, Mapping) else tuple(map(tuple, pattern))
