"""Granite 4: Granite with Mamba-2 in most layers, with or without experts beside an MLP for every token."""

import dataclasses

from jlora.families import granite, granitemoe
from jlora.families.family import Beside, Experts, Names, Values
from jlora.families.fields import Fields
from jlora.families.kinds import SIZE, TEXT
from jlora.families.mamba import read_layers, read_mamba


def read(fields: Fields) -> Values:
    values = granite.read(fields.replaced(intermediate_size=fields.get("shared_intermediate_size", 1024, SIZE)))
    count = values["num_hidden_layers"]
    kinds = fields.get("layer_types", fields.get("layers_block_type", ["mamba"] * count))
    fields.only("position_embedding_type", "rope", "nope")
    rotates = fields.get("position_embedding_type", "nope", TEXT) == "rope"
    layers = read_layers(fields, kinds, count, rope=0 if rotates else None)
    experts = Experts(
        count=fields.get("num_local_experts", 8),
        top_k=fields.get("num_experts_per_tok", 2),
        intermediate_size=fields.get("intermediate_size", 11008),
        normalize=True,
        beside=Beside(module="block_sparse_moe"),
    )
    return values | {
        "mlp_bias": False,
        "ropes": values["ropes"] if rotates else (),
        "layers": tuple(layer._replace(experts=experts.count > 0) for layer in layers),
        "experts": experts if experts.count else None,
        "mamba": read_mamba(fields, values["hidden_size"]),
    }


FAMILY = dataclasses.replace(
    granite.FAMILY,
    model_types=("granitemoehybrid",),
    class_name="GraniteMoeHybridForCausalLM",
    read=read,
    names=Names(
        mixers=(("mamba", "mamba"),),
        mixer_outputs=("out_proj",),
        router="router",
        mlp="shared_mlp",
        mlp_up=("input_linear",),
        mlp_down="output_linear",
    ),
    checkpoint_names=granitemoe.FAMILY.checkpoint_names,
    stacked_experts=granitemoe.FAMILY.stacked_experts,
    single_experts=granitemoe.FAMILY.single_experts,
    gguf=None,
)
