"""Families of models. Each is one file that says everything about it; everything else follows from this table.

A file has a FAMILY, and in MULTIMODAL those whose language model it is (`jlora.families.multimodal`).
"""

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

from jlora.families import (
    apertus,
    arcee,
    bamba,
    cohere,
    cohere2,
    deepseek_v3,
    ernie4_5,
    ernie4_5_moe,
    exaone4,
    falcon_h1,
    flex_olmo,
    gemma,
    gemma2,
    gemma3,
    gemma4,
    gemma4_unified,
    glm,
    glm4,
    glm4_moe_lite,
    gpt2,
    gpt_neox,
    gpt_oss,
    granite,
    granitemoe,
    granitemoehybrid,
    helium,
    hunyuan_v1_dense,
    hunyuan_v1_moe,
    internlm3,
    iquestcoder,
    lfm2,
    lfm2_moe,
    llama,
    ministral3,
    mistral,
    mistral3,
    mistral4,
    mixtral,
    muse_glimmer,
    nanochat,
    nemotron_h,
    olmo2,
    olmo3,
    olmoe,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_next,
    seed_oss,
    smollm3,
    starcoder2,
)
from jlora.families.family import Family

__all__ = ["FAMILIES", "Family", "called", "each", "every"]

Value = TypeVar("Value", bound=Hashable)

# config.json's model_type → the family.
FAMILIES: dict[str, Family] = {
    model_type: family
    for module in (
        *(llama, internlm3, iquestcoder, mistral, mistral3, ministral3, mixtral, smollm3, olmo2, olmo3, granite, phi3),
        *(arcee, seed_oss, exaone4, hunyuan_v1_dense, ernie4_5, nanochat, glm, glm4, helium, starcoder2),
        *(qwen2, qwen2_moe, qwen3, qwen3_moe, qwen3_next, qwen3_5, qwen3_5_moe),
        *(gemma, gemma2, gemma3, gemma4, gemma4_unified, gpt2, gpt_neox),
        *(deepseek_v3, glm4_moe_lite, mistral4),
        *(gpt_oss, lfm2, lfm2_moe, granitemoe, granitemoehybrid, bamba, falcon_h1, apertus, muse_glimmer),
        *(nemotron_h, olmoe, flex_olmo, ernie4_5_moe, hunyuan_v1_moe, cohere, cohere2),
    )
    for family in (module.FAMILY, *getattr(module, "MULTIMODAL", ()))
    for model_type in family.model_types
}


def each(value: Callable[[Family], Value | None]) -> tuple[Value, ...]:
    """What the families have for `value`, each once, in the table's order, without None."""
    return every(lambda family: (value(family),))


def every(values: Callable[[Family], Iterable[Value | None]]) -> tuple[Value, ...]:
    """As `each`, for what a family may have several of."""
    found = dict.fromkeys(item for family in FAMILIES.values() for item in values(family))
    return tuple(item for item in found if item is not None)


def called(*parts: str) -> tuple[str, ...]:
    """The last names of these parts in all families: "head" → ("lm_head", "embed_out").

    Args:
        parts: fields of `Names`.
    """
    paths = every(lambda family: (getattr(family.names, part) for part in parts))
    return tuple(dict.fromkeys(path.split("/")[-1] for path in paths))
