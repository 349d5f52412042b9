"""A weight's change as a product of two narrow matrices: the best one of a given rank, and what it misses."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jlora import quant
from jlora.errors import UserError
from jlora.lora.kinds.kind import RANK, SCALE
from jlora.lora.kinds.product import A, B
from jlora.types import Params


class Change(NamedTuple):
    """What is added to a kernel [D, N]: `left` itself, or the product left [D, K] @ right [K, N] with a small K."""

    left: np.ndarray
    right: np.ndarray | None = None

    def dense(self) -> np.ndarray:
        """The whole matrix."""
        return self.left if self.right is None else self.left @ self.right


@dataclasses.dataclass(frozen=True)
class Fit:
    """How well a product approximates one module's change.

    Attributes:
        name: the module's name.
        rank: the product's rank.
        energy: squared Frobenius norm of the change.
        lost: squared Frobenius norm of the difference between change and product.
    """

    name: str
    rank: int
    energy: float
    lost: float

    @property
    def error(self) -> float:
        """‖ΔW - AB‖ / ‖ΔW‖, Frobenius; 0 if nothing changed."""
        return (self.lost / self.energy) ** 0.5 if self.energy else 0.0


@dataclasses.dataclass(frozen=True)
class Fits:
    """The fits of an adapter's modules; as text, a table with a row for each module."""

    title: str
    modules: tuple[Fit, ...]

    @property
    def energy_kept(self) -> float:
        """1 - Σ‖ΔW - AB‖² / Σ‖ΔW‖² over all modules."""
        total = sum(module.energy for module in self.modules)
        return 1 - sum(module.lost for module in self.modules) / total if total else 1.0

    def __str__(self) -> str:
        width = max((len(module.name) for module in self.modules), default=0)
        rows = [f"{module.name:<{width}}  {module.rank:>5}  {module.error:>8.2e}" for module in self.modules]
        head = f"{'module':<{width}}  {'rank':>5}  {'error':>8}"
        return "\n".join([f"{self.title}: {self.energy_kept:.4%} of the energy kept", head, *rows])


class Axes(NamedTuple):
    """The axes of a module's factors: lora_a is [*stack, *inputs, R], lora_b [*stack, R, *outputs].

    `layers` are the stacked axes that have scales of their own; an axis of experts does not.
    """

    layers: tuple[int, ...]
    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @classmethod
    def of(cls, adapter: Params, ndim: int) -> "Axes":
        """The axes of a module's adapter whose weight has `ndim` axes.

        Factors with as many axes are stacks of matrices (as for experts); others belong to a kernel with several input
        or output axes.
        """
        a, b, layers = (adapter[leaf.name].shape for leaf in (A, B, SCALE))
        stacked = ndim - 2 if len(a) == len(b) == ndim else len(layers)
        return cls(layers, a[:stacked], a[stacked:-1], b[stacked + 1 :])

    @property
    def matrices(self) -> tuple[int, int, int]:
        """(how many weights there are, D, N) where each weight is a matrix [D, N]."""
        return math.prod(self.stack), math.prod(self.inputs), math.prod(self.outputs)

    def spread(self, of_layers: np.ndarray) -> np.ndarray:
        """One value for each layer → that value for each of the layer's weights, [count]."""
        whole = of_layers.reshape((*self.layers, *(1,) * (len(self.stack) - len(self.layers))))
        return np.broadcast_to(whole, self.stack).ravel()

    def factors(self, products: Sequence[tuple[np.ndarray, np.ndarray]]) -> Params:
        """The adapter leaves of a module whose weights change by A [D, r] @ B [r, N], each with a rank of its own."""
        ranks = np.array([left.shape[1] for left, _ in products], np.int32)
        lora_a = np.stack([np.pad(left, ((0, 0), (0, max(ranks) - left.shape[1]))) for left, _ in products])
        lora_b = np.stack([np.pad(right, ((0, max(ranks) - right.shape[0]), (0, 0))) for _, right in products])
        found = {
            A.name: lora_a.reshape(*self.stack, *self.inputs, max(ranks)),
            B.name: lora_b.reshape(*self.stack, max(ranks), *self.outputs),
            SCALE.name: np.ones(self.layers, np.float32),
        }
        if len(set(ranks)) > 1:  # a layer of experts has the largest of their ranks
            found[RANK.name] = ranks.reshape(*self.layers, -1).max(axis=-1)
        return found


def best(change: Change, rank: int | float) -> tuple[Float[np.ndarray, "D R"], Float[np.ndarray, "R N"], float, float]:
    """(A with orthonormal columns, B, the change's energy, the energy lost): the best product (Eckart and Young 1936).

    Args:
        rank: the product's rank, or less if the change has fewer singular values; or, as a float in (0, 1], the share
            of the squared singular values to keep, with the smallest rank that does (as in PEFT's `convert_to_lora`).
    """
    left, values, right = _singular(change)
    squares = values.astype(np.float64) ** 2
    kept = min(rank, len(values)) if isinstance(rank, int) else _enough(values, rank)
    # A copy: a view would keep every singular vector of every module alive.
    return left[:, :kept].copy(), values[:kept, None] * right[:kept], float(squares.sum()), float(squares[kept:].sum())


def check_rank(rank: int | float) -> None:
    """Raises ValueError for a rank that `best` does not accept."""
    if isinstance(rank, bool) or not (rank >= 1 if isinstance(rank, int) else 0 < rank <= 1):
        raise UserError(f"rank is {rank!r}; expected a positive integer, or a float in (0, 1]: the energy to keep")


def _singular(change: Change) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The singular value decomposition; for a product of narrow factors, by way of their QR decompositions."""
    left, right = change
    if right is None or left.shape[1] >= min(left.shape[0], right.shape[1]):
        return np.linalg.svd(change.dense(), full_matrices=False)
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    inner_left, values, inner_right = np.linalg.svd(r_left @ r_right.T)
    return q_left @ inner_left, values, inner_right @ q_right.T


def _enough(values: np.ndarray, share: float) -> int:
    """The smallest rank that keeps this share of the energy.

    The sums are float32, as in PEFT: with a share of 1 this leaves out what is only rounding.
    """
    energy = np.cumsum(values**2)
    return int(np.searchsorted(energy, np.float32(share) * energy[-1])) + 1


def as_float(leaf: Any) -> np.ndarray:
    """A leaf on the host in float32, unpacked if it is packed."""
    return np.asarray(quant.unpacked(leaf), np.float32)
