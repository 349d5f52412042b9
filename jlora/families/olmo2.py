"""OLMo 2 (OLMo team 2025): norms after attention and MLP, and query-key norms."""

from jlora.families.family import Family, Names, Values
from jlora.families.fields import Fields
from jlora.families.gguf import ATTENTION_BIAS, QK_NORMS, Gguf, Reading
from jlora.families.reading import common


def read(fields: Fields, *, norm_eps: float = 1e-5, rope_theta: float = 1e4) -> Values:
    """OLMo 2's values; the arguments are defaults."""
    bias = fields.get("attention_bias", False)
    return common(fields, norm_eps=norm_eps, rope_theta=rope_theta) | {
        "norm": "rms_wide",
        "qk_norm": "all",
        "qkv_bias": bias,
        "output_bias": bias,
    }


FAMILY = Family(
    model_types=("olmo2",),
    class_name="Olmo2ForCausalLM",
    read=read,
    names=Names(attention_norms=(None, "post_attention_layernorm"), mlp_norms=(None, "post_feedforward_layernorm")),
    score="Olmo2",
    gguf=Gguf("olmo2", Reading(biases=ATTENTION_BIAS), modules=QK_NORMS, own_head=True),
)
