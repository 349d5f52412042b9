"""gpt-oss: attention sinks, windows in every second layer, and mixtures whose gates are clamped."""

from jlora.families.family import IN_OUT, Clamped, ExpertNames, Experts, Family, Layer, Names, Values
from jlora.families.fields import Fields
from jlora.families.gguf import DECODER, ROUTED, SILU, Config, Gguf, Metadata, Reading, heads, windows
from jlora.families.kinds import FLAG, NUMBER, POSITIVE
from jlora.families.layouts import Joined, stacked_experts
from jlora.families.reading import common, read_windows

# What transformers takes where config.json says nothing of rotary positions.
ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def read(fields: Fields) -> Values:
    if not fields.rope():
        fields = fields.replaced(rope_parameters=ROPE)
    values = common(fields, num_key_value_heads=8, head_dim=64, norm_eps=1e-5, rope_theta=150000.0)
    count, bias = values["num_hidden_layers"], fields.get("attention_bias", True, FLAG)
    windows = read_windows(fields, fields.get("sliding_window", 128), count, lambda: [i % 2 == 0 for i in range(count)])
    experts = Experts(
        count=fields.get("num_local_experts", fields.get("num_experts", 128)),
        top_k=fields.get("num_experts_per_tok", fields.get("experts_per_token", 4)),
        intermediate_size=values["intermediate_size"],
        normalize=True,
        router_bias=True,
        bias=True,
        interleaved=True,
        clamped=Clamped(fields.get("swiglu_alpha", 1.702, NUMBER), fields.get("swiglu_limit", 7.0, POSITIVE)),
    )
    fields.only("hidden_act", "silu")  # the gates' own, whatever it says, but nothing else is ever said
    return values | {
        "norm": "rms_wide",
        "qkv_bias": bias,
        "output_bias": bias,
        "attention_sinks": True,
        "experts": experts,
        "layers": tuple(Layer(window=window, experts=True) for window in windows),
    }


PERIOD = 2  # layers, of which the first has a window


def from_gguf(metadata: Metadata, config: Config) -> Config:
    metadata.only("feed_forward_length", config["intermediate_size"])
    metadata.only("rope.freq_base_swa", metadata.get("rope.freq_base", 10000.0))
    return heads(metadata, config) | windows(metadata, config, window=128, period=PERIOD)


FAMILY = Family(
    model_types=("gpt_oss",),
    class_name="GptOssForCausalLM",
    read=read,
    names=Names(router="router"),
    score="GptOss",
    stacked_experts=IN_OUT,
    single_experts=ExpertNames(gate_proj="w1", up_proj="w3", down_proj="w2"),
    gguf=Gguf(
        "gpt-oss",
        Reading(
            required={
                **DECODER,
                **ROUTED,
                "num_local_experts": "expert_count",
                "intermediate_size": "expert_feed_forward_length",
            },
            # What config.json would say if nothing, and what llama.cpp computes whatever the file says.
            constants={
                **SILU,
                "attention_bias": True,
                "swiglu_alpha": 1.702,
                "swiglu_limit": 7.0,
                "rope_parameters": {"rope_type": "default"},
            },
            scaling=lambda metadata: {"truncate": False},
            more=from_gguf,
        ),
        writes={"expert_feed_forward_length": lambda config: config.intermediate_size},
        modules={
            "ffn_norm": None,
            "post_attention_norm": "post_attention_layernorm",
            "ffn_gate_inp": "mlp.router",
        },
        joined=(
            Joined("self_attn.sinks", ("attn_sinks.weight",)),
            *stacked_experts("mlp.experts", turned=True, biased=True),
        ),
        period=PERIOD,
        all_biases=True,
        own_head=True,
    ),
)
