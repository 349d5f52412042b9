"""Command R and Aya: Command A without windows, where every layer rotates."""

from jlora.families.cohere2 import NAMES, read_common
from jlora.families.family import Family, Values
from jlora.families.fields import Fields


def read(fields: Fields) -> Values:
    fields.only("use_qk_norm", False)  # Command R+: norms with other weights for every head
    return read_common(fields, rope_theta=5e5)


FAMILY = Family(
    model_types=("cohere",),
    class_name="CohereForCausalLM",
    read=read,
    names=NAMES,
)
