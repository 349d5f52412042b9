"""Ernie 4.5's mixtures: experts chosen by softmax with corrections, and an MLP for every token."""

from jlora.families import ernie4_5
from jlora.families.family import Experts, Family, Names, Values
from jlora.families.fields import Fields
from jlora.families.kinds import EXPERTS, LENGTH, NUMBER, SIZE, whole


def read(fields: Fields) -> Values:
    fields.only(ernie4_5.BIAS, False)  # it would give the head a bias too
    values = ernie4_5.read(fields, num_key_value_heads=4, head_dim=None)
    width = fields.get("moe_intermediate_size", 1536, SIZE)
    experts = Experts(
        count=fields.get("moe_num_experts", 64, whole(1, EXPERTS)),
        top_k=fields.get("moe_k", 6, whole(1, EXPERTS)),
        intermediate_size=width,
        normalize=True,
        correction=True,
        correction_row=True,
        least=float(fields.get("moe_norm_min", 1e-12, NUMBER)),
        shared_intermediate_size=width * fields.get("moe_num_shared_experts", 2, LENGTH),
    )
    first, step = fields.get("moe_layer_start_index", 1, LENGTH), fields.get("moe_layer_interval", 1, SIZE)
    last = fields.get("moe_layer_end_index", -1, whole(-1, 1 << 30))
    last = values["num_hidden_layers"] - 1 if last == -1 else last
    layers = tuple(
        layer._replace(experts=(i + 1) % step == 0 and first <= i <= last) for i, layer in enumerate(values["layers"])
    )
    return values | {"experts": experts, "layers": layers}


FAMILY = Family(
    model_types=("ernie4_5_moe",),
    class_name="Ernie4_5_MoeForCausalLM",
    read=read,
    names=Names(shared_expert="shared_experts"),
    checkpoint_names=((r"\.gate\.e_score_correction_bias$", ".moe_statics.e_score_correction_bias"),),
    # the layers that predict tokens further ahead
    buffers=(r".*\.rotary_emb\.inv_freq", r"(model\.)?mtp.*"),
)
