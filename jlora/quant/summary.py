"""What a tree's weights are kept in, in words: which share is packed, in which format, and what stays wide."""

from collections.abc import Mapping
from typing import Any

from jlora import tree
from jlora.errors import size_of
from jlora.quant.packed import format_of


def kept_in(params: Mapping[str, Any]) -> str:
    """A line for users: weights and bytes by format or dtype, experts apart; "" if nothing is packed or of experts.

    "experts 91.4% in mxfp4 (9.45 GiB), others 8.6% in bfloat16 (3.36 GiB)"
    """
    groups: dict[bool, dict[str, list[int]]] = {}
    packed: set[bool] = set()
    for path, leaf in tree.flatten(dict(params)).items():
        experts = "/experts/" in path
        format = format_of(leaf)
        kind = format or str(leaf.dtype)
        packed |= {experts} if format else set()
        count = groups.setdefault(experts, {}).setdefault(kind, [0, 0])
        count[0] += leaf.size
        count[1] += tree.nbytes(leaf)
    if not packed and True not in groups:
        return ""
    total = sum(size for kinds in groups.values() for size, _ in kinds.values())
    lines = []
    for experts, name in ((True, "experts"), (False, "others" if True in groups else "weights")):
        for kind, (size, nbytes) in sorted(groups.get(experts, {}).items(), key=lambda item: -item[1][0]):
            lines.append(f"{name} {size / total:.1%} in {kind} ({size_of(nbytes)})")
    if True in groups and True not in packed:
        lines.append("the experts are not packed" if packed else "nothing is packed")
    return ", ".join(lines)
