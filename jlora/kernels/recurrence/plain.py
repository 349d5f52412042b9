"""The recurrence token by token: this form defines the numbers, and is the best one for a single token."""

import jax
import jax.numpy as jnp

from jlora.kernels.recurrence.runs import Runs


def forward(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    decays: jax.Array,
    rates: jax.Array | None,
    runs: Runs,
    state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(the output [B, T, K, G, V], the state after the last token [B, K, G, F, V]), both float32.

    Args:
        queries, keys: [B, T, K, F].
        values: [B, T, K, G, V].
        decays, rates: [B, T, K, G].
        state: [B, K, G, F, V], float32.
    """

    def step(carry: tuple[jax.Array, jax.Array], token: tuple) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        state, stem = carry
        query, key, value, decay, rate, run, starts, trunk, branch = token
        old = jnp.where(_wide(starts), 0, state)
        if runs.branches:
            old = jnp.where(_wide(starts & (trunk > 0)), stem, old)
        new = old * jnp.exp(decay)[..., None, None]
        if rate is not None:
            value = (value - _product("bkf,bkgfv->bkgv", key, new)) * rate[..., None]
        new = new + key[:, :, None, :, None] * value[..., None, :]
        y = jnp.where(_wide(run > 0)[..., 0], _product("bkf,bkgfv->bkgv", query, new), 0)
        if runs.branches:
            stem = jnp.where(_wide((run > 0) & ~branch), new, stem)
        return (jnp.where(_wide(run > 0), new, state), stem), y

    arrays = [None if x is None else x.astype(jnp.float32) for x in (queries, keys, values, decays, rates)]
    tokens = (*arrays, runs.run, runs.starts, runs.trunk, runs.branch)
    tokens = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tokens)
    (state, _), y = jax.lax.scan(step, (state, state), tokens)
    return jnp.swapaxes(y, 0, 1), state


def _wide(marks: jax.Array) -> jax.Array:
    """[B] as [B, 1, 1, 1, 1]."""
    return marks[:, None, None, None, None]


def _product(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(spec, left, right, precision="highest")
