"""Ernie 4.5's dense models: Llama that rotates neighbouring values of a head together."""

from jlora.families.family import Family, Values
from jlora.families.fields import Fields
from jlora.families.gguf import SILU, Gguf, Reading
from jlora.families.kinds import FLAG
from jlora.families.reading import common, interleaved

BIAS = "use_bias"


def read(fields: Fields, *, num_key_value_heads: int = 2, head_dim: int | None = 128) -> Values:
    """Ernie 4.5's values; the arguments are defaults."""
    bias, sizes = fields.get(BIAS, False, FLAG), dict(num_key_value_heads=num_key_value_heads, head_dim=head_dim)
    values = common(fields, **sizes, norm_eps=1e-5, rope_theta=5e5, tied=True)
    return interleaved(values) | {"qkv_bias": bias, "output_bias": bias, "mlp_bias": bias}


FAMILY = Family(
    model_types=("ernie4_5",),
    class_name="Ernie4_5ForCausalLM",
    read=read,
    gguf=Gguf("ernie4_5", Reading(constants={**SILU, BIAS: False})),
)
