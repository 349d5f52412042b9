"""Full fine-tuning: the base's own leaves are trained, all or those that patterns choose, without an adapter."""

import dataclasses
import re

from jlora import tree
from jlora.errors import first_few, raise_all
from jlora.lora.partition import is_trainable
from jlora.quant import format_of
from jlora.types import Params

WEIGHTS = ("masters", "stochastic")
# What models hold but do not learn: a router's correction by load, and the constants of an activation.
CONSTANT = re.compile(r"(.*/)?(e_score_correction_bias|beta/value|eps/value)")


@dataclasses.dataclass(frozen=True)
class FullConfig:
    """What a run with lora=None trains, and how it holds that.

    Attributes:
        trainable: regular expressions; leaves whose whole path matches one are trained ("layers/.*", ".*norm/scale").
        weights: how weights of 16 bits take small updates, which rounding would lose: "masters" keeps a float32 copy
            of each for the optimizer, "stochastic" rounds each sum up or down at random, right on average, which saves
            the copies' 4 bytes a parameter (bfloat16 only). Moments are float32. Weights of 32 bits need neither.

    Raises:
        ValueError: a pattern is no regular expression, none is given, or `weights` is unknown; all are listed.
    """

    trainable: tuple[str, ...] = (".*",)
    weights: str = "masters"

    def __post_init__(self) -> None:
        object.__setattr__(self, "trainable", tuple(self.trainable))
        faults = [] if self.trainable else ["full.trainable: found no pattern, expected at least one"]
        if self.weights not in WEIGHTS:
            faults.append(f"full.weights: found {self.weights!r}, expected one of {', '.join(WEIGHTS)}")
        for pattern in self.trainable:
            try:
                re.compile(pattern)
            except re.error as error:
                faults.append(f"full.trainable: {pattern!r} is not a regular expression: {error}")
        raise_all(faults)

    def trains(self, path: str) -> bool:
        """Whether the leaf at `path` is trained: what a pattern matches, and a new head."""
        if is_trainable(path):
            return True
        return not CONSTANT.fullmatch(path) and any(re.fullmatch(pattern, path) for pattern in self.trainable)

    def check(self, params: Params) -> None:
        """Raises UserError if a pattern matches no leaf, or a leaf that is packed; all are listed."""
        flat = tree.flatten(params)
        faults = [
            f"full.trainable: {pattern!r} matches no leaf; paths are like {first_few(sorted(flat))}"
            for pattern in self.trainable
            if not any(re.fullmatch(pattern, path) for path in flat)
        ]
        packed = sorted(path for path, leaf in flat.items() if format_of(leaf) and self.trains(path))
        if packed:
            faults.append(
                f"full.trainable chooses weights that are packed ({format_of(flat[packed[0]])}): {first_few(packed)}; "
                f"{PACKED}, or leave them out with full.trainable"
            )
        raise_all(faults)


PACKED = (
    "their codes are integers, which have no gradients, and packing every update again would erase most of it: train "
    "an adapter beside them (lora.r=…), or weights that are not packed"
)
