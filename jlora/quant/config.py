"""Which leaves of a param tree are packed, and how."""

import dataclasses
import re

from jlora import tree
from jlora.errors import UserError
from jlora.families import each, every
from jlora.quant.formats import FORMATS

# Every linear inside the stack, except those that a family leaves out; embeddings, the head and norms keep their
# precision (as is usual with bitsandbytes).
_STACKS = "|".join(each(lambda family: family.names.stack))
_UNPACKED = tuple((rf"({_STACKS})/(.*/)?{module}/kernel", None) for module in every(lambda family: family.unpacked))
DEFAULT_RULES: tuple[tuple[str, str | None], ...] = (
    *_UNPACKED,
    (rf"({_STACKS})/.*/kernel", "nf4"),
    (r".*", None),
)


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """Which leaves to pack, and how.

    Attributes:
        rules: ordered pairs (regular expression for a full leaf path, format or None); the first match wins, and leaves
            that no rule matches stay as they are. A rule may name a layer or not: "layers/0/mlp/down_proj/kernel" is
            the first layer's, "layers/mlp/down_proj/kernel" every layer's.
        double_quant: keep the block scales of 4-bit formats in 8 bits (4.13 bits a weight), not float32 (4.5 bits).
        merge_aware: keep kernels in 16 or 32 bits and pack them, update included, whenever they are used (`Rounded`),
            so that the packed sum of base and adapter is the model that was trained.

    Raises:
        ValueError: a rule names an unknown format.
    """

    rules: tuple[tuple[str, str | None], ...] = DEFAULT_RULES
    double_quant: bool = True
    merge_aware: bool = False

    def __post_init__(self) -> None:
        unknown = sorted({str(fmt) for _, fmt in self.rules if fmt is not None and fmt not in FORMATS})
        if unknown:
            raise UserError(
                f"QuantConfig.rules: unknown format {', '.join(unknown)}; known: {', '.join(FORMATS)} or None"
            )


def as_config(quant: "str | QuantConfig | None") -> QuantConfig | None:
    """The QuantConfig that `quant` stands for.

    A QuantConfig or None stands for itself, a format's name for the default rules with that format.

    Raises:
        ValueError: the name is unknown.
    """
    if quant is None or isinstance(quant, QuantConfig):
        return quant
    if quant not in FORMATS:
        raise UserError(f"quant={quant!r} is unknown; expected one of {', '.join(FORMATS)}, a QuantConfig, or None")
    return QuantConfig(rules=tuple((pattern, quant if fmt else None) for pattern, fmt in DEFAULT_RULES))


def leaf_format(path: str, config: QuantConfig | None, layer: int | None = None) -> str | None:
    """The format to pack the leaf at `path` in, or None to keep it as it is.

    Args:
        layer: which layer of a stacked leaf; None: the first one that its path names.
    """
    if config is None:
        return None
    paths = [path]
    if stack := tree.stack_of(path):
        layer = layer if layer is not None else stack.layers[0] if stack.layers else 0
        paths = [f"{stack.name}/{layer}/{stack.rest}", f"{stack.name}/{stack.rest}"]
    for pattern, found in config.rules:
        if any(re.fullmatch(pattern, form) for form in paths):
            return found
    return None
