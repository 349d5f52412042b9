"""GLM 4 of April 2025 (0414, Z1): GLM 4 with norms after attention and MLP too."""

from jlora.families import glm
from jlora.families.family import Family
from jlora.families.gguf import Gguf

FAMILY = Family(
    model_types=("glm4",),
    class_name="Glm4ForCausalLM",
    read=glm.read,
    names=glm.FAMILY.names._replace(
        attention_norms=("input_layernorm", "post_self_attn_layernorm"),
        mlp_norms=("post_attention_layernorm", "post_mlp_layernorm"),
    ),
    score="Glm4",
    gguf=Gguf("glm4", glm.READING),
)
