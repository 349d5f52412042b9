"""What to adapt and how, under PEFT's field names."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

INITS = (True, False, "gaussian", "default", "zero_a")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The settings of `peft.LoraConfig` that jlora supports, with PEFT's meaning.

    Attributes:
        r: rank of the update.
        lora_alpha: the update is scaled by lora_alpha / r (by lora_alpha / sqrt(r) with `use_rslora`).
        target_modules: "all-linear" (every linear but the head), a sequence of names (a module matches when its dotted
        name is
            one of them or ends in "." + one of them), or one regular expression for the full dotted name.
        exclude_modules: same forms; these are left out.
        lora_dropout: probability of dropping an input of the update in training.
        use_rslora: see lora_alpha.
        rank_pattern, alpha_pattern: (name or regular expression) → rank or alpha of the modules whose name ends in a
        match. init_lora_weights: True or "default": A uniform in ±1/sqrt(in), B zero. "gaussian": A normal with
        deviation 1/r, B zero.
            "zero_a": A zero, B uniform in ±1/sqrt(r). False: both random, so that the start is not the base model.
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

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        for name in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, name)
            object.__setattr__(
                self, name, tuple(value.items()) if isinstance(value, Mapping) else tuple(map(tuple, value))
            )
        if problems := self._problems():
            raise ValueError("LoraConfig:\n  " + "\n  ".join(problems))

    def _problems(self) -> list[str]:
        problems = []
        if self.r < 1:
            problems.append(f"r={self.r}: expected a positive integer")
        if not 0 <= self.lora_dropout < 1:
            problems.append(f"lora_dropout={self.lora_dropout}: expected a probability in [0, 1)")
        if self.init_lora_weights not in INITS:
            problems.append(f"init_lora_weights={self.init_lora_weights!r}: expected one of {INITS}")
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
