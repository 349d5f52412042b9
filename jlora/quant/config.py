"""Which leaves of a param tree are packed, and how."""

import dataclasses
import re

from jlora import tree
from jlora.errors import UserError
from jlora.quant.formats import FORMATS

# Every linear inside the stack; embeddings, the head and norms keep their precision (as bitsandbytes' users do).
DEFAULT_RULES: tuple[tuple[str, str | None], ...] = ((r"((gpt_neox/)?layers|h)/.*/kernel", "nf4"), (r".*", None))


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """Ordered (regular expression, format or None) rules over full leaf paths, the first match wins; plus the block
    scales' form.

    Attributes:
        rules: formats by path; paths that no rule matches stay as they are. A rule may name a layer or not:
            "layers/0/mlp/down_proj/kernel" is that of the first layer, "layers/mlp/down_proj/kernel" all of them.
        double_quant: block scales of 4-bit formats in 8 bits (4.13 bits a weight) instead of float32 (4.5 bits).
        merge_aware: kernels stay in 16 or 32 bits and are packed, update and all, whenever they are used (`Rounded`),
            so that the packed sum of base and adapter is the model that was trained.
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
    """The QuantConfig that `quant` stands for: itself, the default rules of a format's name, or None.

    Raises:
        ValueError: an unknown name.
    """
    if quant is None or isinstance(quant, QuantConfig):
        return quant
    if quant not in FORMATS:
        raise UserError(f"quant={quant!r} is unknown; expected one of {', '.join(FORMATS)}, a QuantConfig, or None")
    return QuantConfig(rules=tuple((pattern, quant if fmt else None) for pattern, fmt in DEFAULT_RULES))


def leaf_format(path: str, config: QuantConfig | None, layer: int | None = None) -> str | None:
    """The format in which the leaf at `path` is kept; None keeps it as it is.

    Args:
        layer: which layer of a stacked leaf; None: the one that its path names first.
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
