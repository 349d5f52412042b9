"""Dynamic fine-tuning: likelihood without the weight that its gradient gives to improbable tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def dft(nll: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """-sg(p) · log p of every token, where p = exp(-nll) is the probability of its target (Wu et al. 2025, DFT).

    sg passes no gradient, so that the gradient is that of -p, and no token's is divided by a small probability. A term
    for `cross_entropy`; TRL's `loss_type="dft"`.
    """
    return jax.lax.stop_gradient(jnp.exp(-nll)) * nll
