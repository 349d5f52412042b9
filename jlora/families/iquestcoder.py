"""IQuest-Coder, which transformers computes as Llama."""

from jlora.families import llama
from jlora.families.family import Family, Values
from jlora.families.fields import Fields
from jlora.families.reading import common


def read(fields: Fields) -> Values:
    fields.only("clip_qkv")
    fields.only("use_sliding_window", False)
    return llama.read(fields) | common(fields, num_key_value_heads=8, head_dim=128, norm_eps=1e-5)


FAMILY = Family(
    model_types=("iquestcoder",),
    class_name="LlamaForCausalLM",
    read=read,
    gguf=llama.FAMILY.gguf._replace(reading=None),
)
