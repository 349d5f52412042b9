"""InternLM 3, which transformers computes as Llama."""

from jlora.families import llama
from jlora.families.family import Family, Values
from jlora.families.fields import Fields
from jlora.families.kinds import FLAG
from jlora.families.reading import common


def read(fields: Fields) -> Values:
    attention = fields.get("attention_bias", fields.get("qkv_bias", False, FLAG))
    mlp = fields.get("mlp_bias", fields.get("bias", False))
    if attention != mlp:
        fields.problems.append(f"qkv_bias {attention} with bias {mlp} is not supported (nor by transformers)")
    values = common(fields, num_key_value_heads=2, head_dim=128, norm_eps=1e-5)
    return values | {"qkv_bias": attention, "output_bias": attention, "mlp_bias": mlp}


FAMILY = Family(
    model_types=("internlm3",),
    class_name="LlamaForCausalLM",
    read=read,
    gguf=llama.FAMILY.gguf._replace(reading=None),
)
