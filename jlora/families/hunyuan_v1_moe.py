"""Hunyuan's mixtures: Hunyuan with experts in every layer, and an MLP for every token."""

import dataclasses

from jlora.families import hunyuan_v1_dense
from jlora.families.family import Experts, Layer, Values
from jlora.families.fields import Fields
from jlora.families.kinds import EXPERTS, list_of, whole

COUNT = whole(1, EXPERTS)


def read(fields: Fields) -> Values:
    values = hunyuan_v1_dense.read(fields)
    experts = Experts(
        count=fields.get("num_local_experts", fields.get("num_experts", 1)),
        top_k=read_top_k(fields),
        intermediate_size=values["intermediate_size"],
        normalize=True,
        shared_intermediate_size=values["intermediate_size"],
    )
    return values | {"experts": experts, "layers": (Layer(experts=True),) * values["num_hidden_layers"]}


def read_top_k(fields: Fields) -> int:
    """How many experts a token goes to, which config.json may say for each layer."""
    name = "moe_topk"
    if not isinstance(fields.config.get(name), list):
        return fields.get(name, fields.get("num_experts_per_tok", 1), COUNT)
    found = fields.get(name, [1], list_of(COUNT, "whole numbers"))
    if len(set(found)) != 1:
        fields.problems.append(f"{name} {found} is not supported: expected the same number for all layers")
    return next(iter(found), 1)


FAMILY = dataclasses.replace(
    hunyuan_v1_dense.FAMILY,
    model_types=("hunyuan_v1_moe",),
    class_name="HunYuanMoEV1ForCausalLM",
    read=read,
    names=hunyuan_v1_dense.FAMILY.names._replace(shared_expert="shared_mlp"),
    score="HunYuanMoEV1",
    checkpoint_names=((r"\.gate\.weight$", ".gate.wg.weight"),),
    gguf=None,
)
