"""The MLP of a decoder layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.kernels.order import in_turn
from jlora.models.config import ModelConfig
from jlora.models.layers import ACTIVATIONS, LEARNED, Linear, scaled


class MLP(nn.Module):
    """down(act(gate(x)) · up(x)), with gate and up separate or in one product, or down(act(up(x)))."""

    config: ModelConfig
    width: int
    gathered: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, names = self.config, self.config.names
        width = self.width * (2 if config.gated else 1) // len(names.mlp_up)
        parts = []
        for name in names.mlp_up:
            # In sequence, in both passes, so that only one of the two kernels is dequantised at a time.
            y, x = in_turn(Linear(width, config.mlp_bias, self.gathered, name=name)(x), x)
            parts.append(y)
        if config.gated and len(parts) == 1:
            parts = jnp.split(parts[0], 2, axis=-1)
        parts[0] = scaled(parts[0], config.scales.gate)
        learned = LEARNED.get(config.hidden_act)
        y = learned(name=names.activation)(parts[0]) if learned else ACTIVATIONS[config.hidden_act](parts[0])
        y = y * parts[1] if config.gated else y
        y = Linear(config.hidden_size, config.mlp_bias, self.gathered, name=names.mlp_down)(y)
        return scaled(y, config.scales.mlp_out)
