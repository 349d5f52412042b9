"""Packs weights in llama.cpp's K-quants: blocks of 256 values in groups of 16 or 32, whose scales are packed too.

A value is `scale · code - minimum` (Q2_K, Q4_K, Q5_K) or `scale · code` (Q3_K, Q6_K). Each group's scale, and minimum,
is an integer times a float16 of the block. Both are searched for as llama.cpp's own quantiser does: several grids are
tried, each is fitted to its codes by weighted least squares, and the best is taken. A group is a column [S, M] here, so
that every step is one operation on contiguous memory.
"""

import concurrent.futures
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

BLOCK = 256  # values of a row that are packed together
CHUNK = 256  # blocks at a time: what is in use stays in a core's cache
BITS = np.arange(8, dtype=np.uint8)[:, None]


def quantize(values: np.ndarray, type: str) -> np.ndarray:
    """The bytes [..., rows, bytes of a row] of values [..., rows, columns], on all cores.

    Args:
        values: finite; 256 divides the columns.
        type: one of `KINDS`.
    """
    kind = KINDS[type]
    blocks = np.ascontiguousarray(values, np.float32).reshape(-1, BLOCK)
    packed = np.empty((len(blocks), kind.nbytes), np.uint8)

    def pack(start: int) -> None:
        # Values of less than 1e-30 have steps so small that a grid is infinite or undefined: it is not taken.
        with np.errstate(all="ignore"):
            packed[start : start + CHUNK] = kind.pack(blocks[start : start + CHUNK])

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(pack, range(0, len(blocks), CHUNK)))
    return packed.reshape(*values.shape[:-1], values.shape[-1] // BLOCK * kind.nbytes)


class Packed(NamedTuple):
    """Blocks [N, 256] as integers, before they are laid out as bytes.

    Attributes:
        codes: [N, 256].
        scales: [N, G], the groups' scales in units of `unit`.
        unit: [N] in float16.
        minima, minimum_unit: likewise of the minima; None if there are none.
    """

    codes: np.ndarray
    scales: np.ndarray
    unit: np.ndarray
    minima: np.ndarray | None = None
    minimum_unit: np.ndarray | None = None


# ---------------------------------------------------------------- the search


def _with_minima(
    blocks: np.ndarray, size: int, top: int, largest: int, weigh: Callable[[np.ndarray], np.ndarray], grids: np.ndarray
) -> Packed:
    """Blocks as codes of 0 … `top`, with scales and minima of 0 … `largest`.

    Args:
        size: values in a group.
        weigh: the weights of the squared errors of groups [S, M].
        grids: what to add to `top` for the number of steps that a grid has between a group's ends.
    """
    groups = _groups(blocks, size)
    scale, minimum = _fit_with_minimum(groups, weigh(groups), top, grids)
    unit, scales = _in_units(scale.reshape(len(blocks), -1), largest)
    minimum_unit, minima = _in_units(minimum.reshape(len(blocks), -1), largest)
    shift, scale = _product(minimum_unit, minima), _product(unit, scales)
    codes = np.where(scale > 0, np.rint((groups + shift) / _or_one(scale)), 0).clip(0, top)
    return Packed(_ungrouped(codes, len(blocks)), scales.view(np.uint8), unit, minima.view(np.uint8), minimum_unit)


def _fit_with_minimum(x: np.ndarray, weights: np.ndarray, top: int, grids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(scale ≥ 0, minimum ≥ 0) [M] of groups [S, M]: those of the grid with the least weighted squared error."""
    low, high = np.minimum(x.min(0), 0), x.max(0)
    scale = (high - low) / top
    codes, weighted = np.empty_like(x), weights * x
    w, wx, wxx = weights.sum(0), weighted.sum(0), _dot(weighted, x)
    best = np.full_like(low, np.inf)
    for more in grids:
        # From the best minimum so far, with which the later grids fit better than with the smallest value.
        np.subtract(x, low, out=codes)
        np.multiply(codes, (top + more) / _or_one(high - low), out=codes)
        np.clip(np.rint(codes, out=codes), 0, top, out=codes)
        np.multiply(weights, codes, out=weighted)
        wc, wcc, wcx = weighted.sum(0), _dot(weighted, codes), _dot(weighted, x)
        determinant = w * wcc - wc * wc
        found = determinant > 0
        slope = (w * wcx - wc * wx) / _or_one(determinant)
        start = (wcc * wx - wc * wcx) / _or_one(determinant)
        slope = np.where(start > 0, wcx / _or_one(wcc), slope)  # minima are subtracted, so no start is above 0
        start = np.minimum(start, 0)
        error = wxx - slope * wcx - start * wx  # of a least squares fit
        found &= (error < best) & (slope > 0)
        best, scale, low = (np.where(found, *pair) for pair in ((error, best), (slope, scale), (start, low)))
    return scale, -low


def _without_minima(blocks: np.ndarray, half: int, largest: int, grids: np.ndarray) -> Packed:
    """Blocks as codes of -`half` … `half` - 1, to which `half` is added, with scales of -`largest` … `largest` - 1.

    Args:
        grids: what to add to `half` for the code, but for its sign, of a group's value that is largest in size.
    """
    groups = _groups(blocks, 16)
    scale = _fit(groups, _by_size(groups), half, grids).reshape(len(blocks), -1)
    unit, scales = _in_units(scale, largest, signed=True)
    scale = _product(unit, scales)
    codes = np.where(scale != 0, np.rint(groups / _or_one(scale)), 0).clip(-half, half - 1) + half
    return Packed(_ungrouped(codes, len(blocks)), scales, unit)


def _fit(x: np.ndarray, weights: np.ndarray, half: int, grids: np.ndarray) -> np.ndarray:
    """The scale [M] of groups [S, M], of either sign, with the least weighted squared error."""
    largest = _largest(x, axis=0)
    codes, squares, weighted = np.empty_like(x), np.empty_like(x), weights * x
    best, scale = np.zeros_like(largest), np.zeros_like(largest)
    for more in grids:
        np.multiply(x, -(half + more) / _or_one(largest), out=codes)
        np.clip(np.rint(codes, out=codes), -half, half - 1, out=codes)
        wcx, wcc = _dot(weighted, codes), _dot(weights, np.multiply(codes, codes, out=squares))
        slope = wcx / _or_one(wcc)
        found = slope * wcx > best  # by how much the error is less than without codes
        best, scale = np.where(found, slope * wcx, best), np.where(found, slope, scale)
    return scale


def _in_units(values: np.ndarray, largest: int, *, signed: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(unit [N] in float16, integers [N, G]) of values [N, G].

    Units are rounded up, so that the largest value is an integer in range.

    Args:
        signed: integers are -`largest` … `largest` - 1, else 0 … `largest`.
    """
    unit = _largest(values, axis=1) / (-largest if signed else largest)
    rounded = unit.astype(np.float16)
    up = np.nextafter(rounded, np.copysign(np.float16(np.inf), rounded))
    rounded = np.where(np.abs(rounded.astype(np.float32)) < np.abs(unit), up, rounded)
    integers = np.rint(values / _or_one(rounded.astype(np.float32))[:, None])
    limits = (-largest, largest - 1) if signed else (0, largest)
    return rounded, integers.clip(*limits).astype(np.int8)


def _product(unit: np.ndarray, integers: np.ndarray) -> np.ndarray:
    """What readers compute of each group [N, G], as [N · G] in float32."""
    return (unit.astype(np.float32)[:, None] * integers).reshape(-1)


def _groups(blocks: np.ndarray, size: int) -> np.ndarray:
    return np.ascontiguousarray(blocks.reshape(-1, size).T)


def _ungrouped(codes: np.ndarray, count: int) -> np.ndarray:
    return np.ascontiguousarray(codes.T, np.uint8).reshape(count, BLOCK)


def _largest(values: np.ndarray, axis: int) -> np.ndarray:
    """The value that is largest in size, with its sign."""
    low, high = values.min(axis), values.max(axis)
    return np.where(-low > high, low, high)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("sm,sm->m", a, b)


def _or_one(divisor: np.ndarray) -> np.ndarray:
    return np.where(divisor == 0, np.float32(1), divisor)


# ---------------------------------------------------------------- bytes


def _q2(blocks: np.ndarray) -> np.ndarray:
    """Scales and minima of 4 bits, codes of 2."""
    found = _with_minima(blocks, 16, 3, 15, np.abs, _steps(-0.5, 1.0))
    return _joined(found.scales | found.minima << 4, _twos(found.codes), found.unit, found.minimum_unit)


def _q3(blocks: np.ndarray) -> np.ndarray:
    """The codes' high bits, their two low bits, scales of 6 bits."""
    found = _without_minima(blocks, 4, 32, _steps(-0.9, 0.9))
    codes, scales = found.codes, (found.scales + np.int8(32)).view(np.uint8)
    low = scales[:, :8] & 15 | (scales[:, 8:] & 15) << 4
    high = np.bitwise_or.reduce((scales >> 4).reshape(-1, 4, 4) << 2 * BITS[:4], axis=1)
    return _joined(_eighths(codes >> 2), _twos(codes & 3), low, high, found.unit)


def _q4(blocks: np.ndarray) -> np.ndarray:
    """Scales and minima of 6 bits, codes of 4."""
    found = _with_minima(blocks, 32, 15, 63, _by_size, _steps(-1.0, 1.0))
    return _joined(found.unit, found.minimum_unit, _sixes(found), _fours(found.codes))


def _q5(blocks: np.ndarray) -> np.ndarray:
    """As Q4_K, with the codes' fifth bits before the others."""
    found = _with_minima(blocks, 32, 31, 63, _by_size, _steps(-0.5, 1.0))
    codes = found.codes
    return _joined(found.unit, found.minimum_unit, _sixes(found), _eighths(codes >> 4), _fours(codes & 15))


def _q6(blocks: np.ndarray) -> np.ndarray:
    """Four low bits of the codes, two high bits, scales of 8 bits."""
    found = _without_minima(blocks, 32, 128, _steps(-0.9, 0.9))
    quarters = (found.codes & 15).reshape(-1, 2, 4, 32)
    low = quarters[:, :, :2] | quarters[:, :, 2:] << 4
    return _joined(low, _twos(found.codes >> 4), found.scales, found.unit)


def _steps(first: float, last: float) -> np.ndarray:
    """A tenth apart; the best grid is seldom the one that just reaches a group's ends."""
    return np.linspace(first, last, round(10 * (last - first)) + 1, dtype=np.float32)


def _by_size(groups: np.ndarray) -> np.ndarray:
    """Weights of squared errors, by which large values count more, but by less than their squares."""
    return np.abs(groups) + np.sqrt(np.square(groups).mean(0))


def _joined(*parts: np.ndarray) -> np.ndarray:
    """The parts [N, …] of blocks, side by side as bytes [N, …]."""
    return np.concatenate([np.ascontiguousarray(part).view(np.uint8).reshape(len(part), -1) for part in parts], axis=1)


def _twos(codes: np.ndarray) -> np.ndarray:
    """Codes [N, 256] of two bits: a byte holds those that are 32 apart in a half of the block."""
    return np.bitwise_or.reduce(codes.reshape(-1, 2, 4, 32) << 2 * BITS[:4], axis=2)


def _fours(codes: np.ndarray) -> np.ndarray:
    """Codes [N, 256] of four bits: a byte holds those that are 32 apart in a quarter of the block."""
    quarters = codes.reshape(-1, 4, 2, 32)
    return quarters[:, :, 0] | quarters[:, :, 1] << 4


def _eighths(bits: np.ndarray) -> np.ndarray:
    """Single bits [N, 256]: a byte holds those that are 32 apart."""
    return np.bitwise_or.reduce(bits.reshape(-1, 8, 32) << BITS, axis=1)


def _sixes(found: Packed) -> np.ndarray:
    """Eight scales and eight minima of 6 bits in 12 bytes: the first four whole, with high bits of the last four."""
    scales, minima = found.scales, found.minima
    first = [kind[:, :4] | kind[:, 4:] >> 4 << 6 for kind in (scales, minima)]
    return np.concatenate([*first, scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4], axis=1)


class Kind(NamedTuple):
    """How a type is packed.

    Attributes:
        pack: float32 blocks [N, 256] → bytes [N, nbytes].
        nbytes: of a block.
    """

    pack: Callable[[np.ndarray], np.ndarray]
    nbytes: int


# llama.cpp's name of a type → how it is packed.
KINDS = {
    "Q2_K": Kind(_q2, 84),
    "Q3_K": Kind(_q3, 110),
    "Q4_K": Kind(_q4, 144),
    "Q5_K": Kind(_q5, 176),
    "Q6_K": Kind(_q6, 210),
}
