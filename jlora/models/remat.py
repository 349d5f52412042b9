"""Which values of a layer's forward pass are saved for the backward pass, and which are recomputed."""

from collections.abc import Callable

import jax

from jlora.errors import UserError
from jlora.types import SAVED

# The checkpoint_name of a layer's input.
LAYER_INPUT = "layer_input"


def _offload() -> Callable:
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    )


# Name → (the policy or None, whether to recompute in tiles). "full" saves only a layer's input, "offload" the same in
# the host's memory, "none" also the outputs of products and of attention: norms, rotations and activations are cheaper
# to recompute than to keep.
POLICIES: dict[str, tuple[Callable[[], Callable | None], bool]] = {
    "full": (lambda: None, True),
    "offload": (_offload, True),
    "none": (lambda: jax.checkpoint_policies.save_only_these_names(SAVED), False),
}


def name_of(remat: bool | str) -> str:
    """The policy's name; True is "full", False is "none".

    Raises:
        UserError: there is no such policy.
    """
    name = {True: "full", False: "none"}.get(remat, remat)
    if name not in POLICIES:
        raise UserError(f"found remat {remat!r}; expected True, False, {', '.join(map(repr, POLICIES))}")
    return name


def rematerialised(apply: Callable, remat: bool | str, *, looped: bool) -> Callable:
    """The layer's function, which recomputes values in the backward pass as the policy says.

    Args:
        looped: whether the layer alone is the body of a loop. Where it is not, compilers see several layers at once:
            they would recompute all of them before they need the last, or not at all, so that a barrier holds each
            back until its turn.
    """
    policy, _ = POLICIES[name_of(remat)]
    return jax.checkpoint(apply, prevent_cse=not looped, policy=policy())


def is_lean(remat: bool | str) -> bool:
    """Whether the policy recomputes in tiles."""
    return POLICIES[name_of(remat)][1]
