"""Qwen 3.5's text models: Qwen 3 Next's layers without experts, with a linear for each input of the delta nets."""

from jlora.families.family import Family, Values
from jlora.families.fields import Fields
from jlora.families.qwen3_next import NAMES, SENSITIVE, read_common


def read(fields: Fields) -> Values:
    return read_common(fields, fused=False)


FAMILY = Family(
    model_types=("qwen3_5_text",),
    class_name="Qwen3_5ForCausalLM",
    read=read,
    names=NAMES,
    score="Qwen3_5Text",
    unpacked=SENSITIVE,
    buffers=(r".*\.rotary_emb\.inv_freq", r"mtp\..*"),
)
