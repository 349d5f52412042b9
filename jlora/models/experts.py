"""Mixtures of experts: a router, and gated MLPs, of which every token uses a few (Shazeer et al. 2017)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora import lora, sharding, tree
from jlora.families.family import Clamped, Experts
from jlora.models.config import ModelConfig
from jlora.models.layers import ACTIVATIONS, Linear, Norm, Parameter, leaves, used
from jlora.models.mlp import MLP
from jlora.models.routing import choose
from jlora.types import Params

CORRECTION = "e_score_correction_bias"


class Router(nn.Module):
    """(float32 weights, numbers) of every token's experts.

    The leaf is not called `kernel`, so that by default it is neither adapted nor packed.
    """

    experts: Experts

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        experts = self.experts
        if self.is_initializing():
            self.param("router", nn.initializers.lecun_normal(), (x.shape[-1], experts.count))
            if experts.router_bias:
                self.param("bias", nn.initializers.zeros, (experts.count,))
            if experts.correction:
                shape = (1, experts.count) if experts.correction_row else (experts.count,)
                self.param(CORRECTION, nn.initializers.zeros, shape)
        weights = leaves(self)
        own = {name: leaf for name, leaf in weights.items() if name not in ("router", CORRECTION)}
        x = x.astype(jnp.float32) if experts.sigmoid else x
        logits = lora.linear(x, own | {"kernel": weights["router"]})
        return choose(logits, experts, weights[CORRECTION].reshape(-1) if experts.correction else None)


class ScaledRouter(nn.Module):
    """As Router, from normed inputs; these and the weights are multiplied by learned numbers (Gemma 4)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        experts, width = self.config.experts, x.shape[-1]
        x = Norm("rms_bare", self.config.norm_eps)(x)
        x = x * Parameter((width,), name="scale")().astype(x.dtype)[None] * jnp.asarray(width**-0.5, x.dtype)
        weights, chosen = choose(Linear(experts.count, name="proj")(x), experts)
        return weights * Parameter((experts.count,), name="per_expert_scale")()[chosen], chosen


def mixture_leaves(config: ModelConfig, layer: Params) -> Params:
    """The leaves of a mixture among those at its path, which may be those of the whole layer."""
    names, shared = config.names, config.names.shared_expert
    own = (names.router, "experts", shared, f"{shared}_gate", *names.expert_latents)
    return {name: layer[name] for name in own if name in layer}


class Grouped(nn.Module):
    """Rows, sorted by expert, times their experts' kernels [E, D, N] (+ biases [E, N])."""

    count: int
    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        if self.is_initializing():
            initialise = nn.initializers.lecun_normal(batch_axis=0)
            self.param("kernel", initialise, (self.count, x.shape[-1], self.features))
            if self.use_bias:
                self.param("bias", nn.initializers.zeros, (self.count, self.features))
        return lora.grouped_linear(x, sizes, used(self))


class ExpertMLPs(nn.Module):
    """down(act(gate) · up), or `Clamped`, in every expert, with gate and up in one product; or down(act(up))."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        experts, gated, activation = self.config.experts, self.config.gated, ACTIVATIONS[self.config.hidden_act]
        width, name = experts.intermediate_size * (2 if gated else 1), "gate_up_proj" if gated else "up_proj"
        joined = Grouped(experts.count, width, experts.bias, name=name)(x, sizes)
        if not gated:
            y = activation(joined)
        else:
            parts = (joined[..., 0::2], joined[..., 1::2]) if experts.interleaved else jnp.split(joined, 2, axis=-1)
            y = _clamped(*parts, experts.clamped) if experts.clamped else activation(parts[0]) * parts[1]
        return Grouped(experts.count, x.shape[-1], experts.bias, name="down_proj")(y, sizes)


def _clamped(gate: jax.Array, up: jax.Array, rule: Clamped) -> jax.Array:
    gate, up = jnp.minimum(gate, rule.limit), jnp.clip(up, -rule.limit, rule.limit)
    return (up + 1) * (gate * nn.sigmoid(gate * rule.alpha))


class Mixture(nn.Module):
    """The `top_k` likeliest experts of every token, weighted by the router; no token is dropped."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, routed: jax.Array | None = None) -> jax.Array:
        """The experts' outputs [B, T, D].

        Args:
            routed: what the router reads; default: what the experts read.
        """
        experts, name = self.config.experts, self.config.names.router
        if sharding.is_spread(x) and not self.is_initializing():
            # Otherwise every device would compute all tokens, since sorting by expert mixes those of all devices.
            flat = sharding.gathered("/".join(self.path), tree.flatten(mixture_leaves(self.config, leaves(self))))
            alone, inputs = Mixture(self.config, parent=None), (x,) if routed is None else (x, routed)
            return sharding.apart(
                lambda params, *inputs: alone.apply({"params": params}, *inputs), tree.unflatten(flat), *inputs
            )
        rows = x.reshape(-1, x.shape[-1])
        read = rows if routed is None else routed.reshape(rows.shape)
        router = ScaledRouter(self.config, name=name) if experts.scaled else Router(experts, name=name)
        weights, chosen = router(read)
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        sizes = jnp.bincount(chosen.reshape(-1), length=experts.count).astype(jnp.int32)
        inputs = self._narrow(rows, 0, experts.latent_size)
        y = ExpertMLPs(self.config, name="experts")(inputs[order // experts.top_k], sizes)
        y = y[jnp.argsort(order)].reshape(-1, experts.top_k, y.shape[-1])  # back in the tokens' order
        y = self._narrow(jnp.sum(y * weights.astype(x.dtype)[..., None], axis=1), 1, x.shape[-1])
        return (y + self._shared(rows) if experts.shared_intermediate_size else y).reshape(x.shape)

    def _narrow(self, rows: jax.Array, which: int, width: int) -> jax.Array:
        """The rows as the experts' inputs (0), or the experts' outputs as the mixture's (1)."""
        name = self.config.names.expert_latents[which]
        return Linear(width, self.config.mlp_bias, name=name)(rows) if self.config.experts.latent_size else rows

    def _shared(self, rows: jax.Array) -> jax.Array:
        """What the MLP for every token adds."""
        experts, name = self.config.experts, self.config.names.shared_expert
        y = MLP(self.config, experts.shared_intermediate_size, name=name)(rows)
        return nn.sigmoid(Linear(1, name=f"{name}_gate")(rows)) * y if experts.shared_gate else y
