"""The settings of the optimizer, and what is checked about them."""

import dataclasses
import difflib
import math
from collections.abc import Iterator

from jlora.errors import UserError
from jlora.optim.rules import OPTIMIZERS, OWN, Rule

SCHEDULES = ("constant", "linear", "cosine", "wsd")
WSD_DECAY = 0.1


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Settings of the optimizer. None stands for the default of the named optimizer or schedule, which replaces it.

    Attributes:
        name: "adamw"; "adamw_8bit" holds its moments in blocks of 8-bit codes (Dettmers et al. 2021); "adafactor" holds
            rows and columns of them (Shazeer and Stern 2018); "lion" (Chen et al. 2023); "muon" orthogonalises the
            steps of matrices (Jordan et al. 2024) at AdamW's learning rates (Liu et al. 2025), the rest is AdamW's;
            "schedule_free_adamw" trains an average instead of lowering the learning rate (Defazio et al. 2024).
        learning_rate: peak rate. LoRA needs about ten times the rate of full fine-tuning ("LoRA Without Regret", 2025).
        schedule: what follows the warm-up: "constant"; "linear" or "cosine" decay until the last step; "wsd", constant
            and then a cosine decay. None: "cosine", and "constant" for schedule_free_adamw, which has no other.
        warmup_steps: steps of linear increase from zero.
        warmup_ratio: the share of all steps in which the rate increases, rounded up, instead of `warmup_steps`.
        min_lr_ratio: the rate that a schedule decays to, as a share of `learning_rate`.
        decay_ratio: the share of all steps in which "wsd" decays; None: 0.1.
        weight_decay: decay of matrices; biases and norm scales do not decay, as in transformers' Trainer.
        decay_magnitudes: whether DoRA's magnitudes, which do not start at zero, decay too, as they do in transformers'.
        b1: decay of the mean of gradients in Adam's family; in lion, the share of that mean in a step.
        b2: decay of the mean of squared gradients in Adam's family; in lion, of the mean of gradients that is kept.
        eps: added to the root of that mean in Adam's family; in adafactor, to squared gradients.
        momentum: decay of muon's mean of gradients.
        beta2_decay: exponent of adafactor's decay, which depends on the step, as in PyTorch.
        clip_threshold: adafactor's steps are scaled down to this root mean square, as in transformers.
        max_grad_norm: gradients are scaled down to this global norm; 0 turns clipping off.
        loraplus_lr_ratio: rate of B over rate of A (LoRA+, Hayou et al. 2024).

    Raises:
        UserError: unknown names, values out of range, settings that the optimizer or schedule lacks; all are listed.
    """

    name: str = "adamw"
    learning_rate: float = 2e-4
    schedule: str | None = None
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    min_lr_ratio: float = 0.0
    decay_ratio: float | None = None
    weight_decay: float = 0.0
    decay_magnitudes: bool = False
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    momentum: float | None = None
    beta2_decay: float | None = None
    clip_threshold: float | None = None
    max_grad_norm: float = 1.0
    loraplus_lr_ratio: float = 1.0

    def __post_init__(self) -> None:
        rule = OPTIMIZERS.get(self.name)
        problems = [*self._misfits(rule)] if rule else [_unknown("name", self.name, OPTIMIZERS)]
        for name, value in self._defaults(rule).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # so that what is compared on a resume is what is computed
        if problems := [*problems, *self._out_of_range()]:
            raise UserError("optim:\n  " + "\n  ".join(problems))

    def _defaults(self, rule: Rule | None) -> dict[str, float | str]:
        found = {"schedule": "constant" if rule and rule.averages else "cosine"}
        found |= {"decay_ratio": WSD_DECAY} if self.schedule == "wsd" else {}
        return found | dict(rule.settings if rule else {})

    def _misfits(self, rule: Rule) -> Iterator[str]:
        """A fault for each setting that has no meaning beside the others."""
        for name in OWN:
            if name not in rule.settings and getattr(self, name) is not None:
                has = ", ".join(rule.settings)
                yield f"{name}={getattr(self, name)}: {self.name} has no such setting; it has {has}"
        if rule.averages and self.schedule not in (None, "constant"):
            yield f"schedule={self.schedule!r}: {self.name} averages instead; leave it out or set 'constant'"
        if self.warmup_steps and self.warmup_ratio:
            yield f"warmup_ratio={self.warmup_ratio}: warmup_steps={self.warmup_steps} says the same; set one of them"
        if self.decay_ratio is not None and self.schedule != "wsd":
            yield f"decay_ratio={self.decay_ratio}: only schedule='wsd' has it"
        if self.min_lr_ratio and (self.schedule == "constant" or rule.averages):
            yield f"min_lr_ratio={self.min_lr_ratio}: schedule='constant' does not decay"

    def _out_of_range(self) -> Iterator[str]:
        if self.schedule not in SCHEDULES:
            yield _unknown("schedule", self.schedule, SCHEDULES)
        for words, fits, names in (
            (
                "a positive, finite number",
                lambda value: 0 < value < math.inf,
                ("learning_rate", "loraplus_lr_ratio", "eps"),
            ),
            ("a positive number", lambda value: value > 0, ("clip_threshold",)),
            ("zero or more, and finite", lambda value: 0 <= value < math.inf, ("weight_decay", "warmup_steps")),
            ("zero or more", lambda value: value >= 0, ("max_grad_norm",)),
            ("[0, 1)", lambda value: 0 <= value < 1, ("b1", "b2", "momentum")),
            ("[0, 1]", lambda value: 0 <= value <= 1, ("warmup_ratio", "min_lr_ratio", "decay_ratio")),
            ("a negative number", lambda value: value < 0, ("beta2_decay",)),
        ):
            for name in names:
                value = getattr(self, name)
                if value is not None and not fits(value):
                    yield f"{name}={value}: expected {words}"


def _unknown(setting: str, found: str, known: "dict[str, Rule] | tuple[str, ...]") -> str:
    near = difflib.get_close_matches(found, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{setting}={found!r}: expected one of {', '.join(known)}{hint}"
