"""The gradients of a head's leaves, of those alone that are differentiated, summed over chunks of tokens."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jlora import tree
from jlora.types import Params


class Gradients(NamedTuple):
    """A head's leaves by path, with their gradients to be computed.

    Attributes:
        learned: the leaves that are differentiated: an adapter's, or the head's own in full fine-tuning.
        constant: the others, packed or not.
    """

    learned: dict[str, jax.Array]
    constant: dict[str, Any]

    @classmethod
    def of(cls, head: Params) -> "Gradients":
        """Those of a head as a rule with symbolic zeros receives it: every array says whether it is differentiated."""
        flat = tree.flatten(head)
        values = tree.flatten(whole(head))
        learned = {path for path, leaf in flat.items() if any(part.perturbed for part in jax.tree.leaves(leaf))}
        return cls(
            {path: leaf for path, leaf in values.items() if path in learned},
            {path: leaf for path, leaf in values.items() if path not in learned},
        )

    def head(self, learned: dict[str, jax.Array]) -> Params:
        """The head with these in place of `learned`."""
        return tree.unflatten(self.constant | learned)

    def zeros(self) -> dict[str, jax.Array]:
        """What the sums start from: float32, since a sum of many chunks in 16 bits would lose the later ones."""
        return {path: jnp.zeros(leaf.shape, jnp.float32) for path, leaf in self.learned.items()}

    def add(self, sums: dict[str, jax.Array], more: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The sums with a chunk's gradients."""
        return {path: sums[path] + leaf.astype(jnp.float32) for path, leaf in more.items()}

    def whole(self, sums: dict[str, jax.Array]) -> Params:
        """The head's cotangent: the sums in the leaves' dtypes, and None for what is constant."""
        found = {path: leaf.astype(self.learned[path].dtype) for path, leaf in sums.items()}
        return tree.unflatten(dict.fromkeys(self.constant) | found)


def whole(head: Params) -> Params:
    """The values of a head as a rule with symbolic zeros receives it."""
    return jax.tree.map(lambda part: part.value, head)


def is_given(cotangent: Any) -> bool:
    """Whether a cotangent is an array, and not a zero by construction."""
    return not isinstance(cotangent, SymbolicZero)
