"""Every architecture read from GGUF, from files laid out as llama.cpp's converter lays them out, against transformers.

Names come from the gguf package; where transformers reads the architecture from GGUF, its reading is a second judge.
"""

import copy
import functools
import json
import math
import re
import types
import warnings

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import jlora
from jlora import hub, lora, models, tree
from jlora.families import FAMILIES
from jlora.hub.gguf import kquants
from jlora.hub.gguf.mixtures import types_of
from jlora.hub.gguf.reading import GGUFFile

SIZES = dict(
    vocab_size=101,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, rope_theta=1e4)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=5e5)
LONGROPE = dict(
    rope_type="longrope",
    rope_theta=1e4,
    short_factor=[1.0, 1.25],
    long_factor=[1.5, 3.0],
    original_max_position_embeddings=16,
    partial_rotary_factor=0.5,
)
GROWING = YARN | dict(mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.4, original_max_position_embeddings=5)
MOE = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=20, norm_topk_prob=True)
GPT_OSS = dict(num_local_experts=5, num_experts_per_tok=2, head_dim=12, sliding_window=6, num_hidden_layers=3)
DELTA = SIZES | dict(
    num_hidden_layers=5,
    head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=6,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_conv_kernel_dim=3,
    partial_rotary_factor=0.5,
)
SHARED = MOE | dict(shared_expert_intermediate_size=12)
GEMMA4 = SIZES | dict(head_dim=12, global_head_dim=16, sliding_window=6, pad_token_id=0, final_logit_softcapping=3.0)
LATENT = SIZES | dict(
    num_key_value_heads=6,
    kv_lora_rank=18,
    q_lora_rank=22,
    qk_nope_head_dim=10,
    qk_rope_head_dim=6,
    v_head_dim=12,
    moe_intermediate_size=20,
    num_experts_per_tok=3,
    routed_scaling_factor=1.7,
)
NEOX = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
GPT2 = dict(vocab_size=101, n_embd=48, n_layer=3, n_head=3, n_positions=1024, tie_word_embeddings=True)

# case → (GGUF's architecture, transformers' config class, its fields, whether transformers can read its GGUF file too)
CASES = {
    "llama": ("llama", "LlamaConfig", SIZES | dict(tie_word_embeddings=True), True),
    "llama-wide-heads": ("llama", "LlamaConfig", SIZES | dict(head_dim=20, rms_norm_eps=1e-5), True),
    "llama-biases": ("llama", "LlamaConfig", SIZES | dict(attention_bias=True, mlp_bias=True), False),
    "llama-linear": (
        "llama",
        "LlamaConfig",
        SIZES | dict(rope_parameters=dict(rope_type="linear", factor=2.5, rope_theta=1e5)),
        False,
    ),
    "llama-yarn": ("llama", "LlamaConfig", SIZES | dict(head_dim=20, rope_parameters=YARN), False),
    "llama-yarn-betas": (
        "llama",
        "LlamaConfig",
        SIZES | dict(head_dim=20, rope_parameters=YARN | dict(beta_fast=8.0, beta_slow=0.5, attention_factor=0.9)),
        False,
    ),
    "llama-3": (
        "llama",
        "LlamaConfig",
        SIZES
        | dict(head_dim=16, max_position_embeddings=16384)
        | dict(rope_parameters=LLAMA3 | dict(original_max_position_embeddings=8192)),
        False,
    ),
    "mistral": ("llama", "MistralConfig", SIZES | dict(head_dim=10, sliding_window=None), True),
    "ministral3": ("mistral3", "Ministral3Config", SIZES | dict(head_dim=10, rope_parameters=GROWING), False),
    "ministral3-plain": (
        "mistral3",
        "Ministral3Config",
        SIZES | dict(head_dim=20, rope_parameters=GROWING | dict(mscale=None, mscale_all_dim=0.0)),
        False,
    ),
    "mixtral": (
        "llama",
        "MixtralConfig",
        SIZES | dict(num_local_experts=5, num_experts_per_tok=2, sliding_window=None),
        False,
    ),
    "qwen2": ("qwen2", "Qwen2Config", SIZES | dict(tie_word_embeddings=True), True),
    "qwen2-yarn": ("qwen2", "Qwen2Config", SIZES | dict(rope_parameters=YARN), False),
    "qwen3": ("qwen3", "Qwen3Config", SIZES | dict(head_dim=128), True),
    "qwen3-bias": ("qwen3", "Qwen3Config", SIZES | dict(head_dim=20, attention_bias=True), False),
    "qwen3moe": ("qwen3moe", "Qwen3MoeConfig", SIZES | MOE | dict(head_dim=12), False),
    "gemma": ("gemma", "GemmaConfig", SIZES | dict(head_dim=20), False),
    "gemma2": (
        "gemma2",
        "Gemma2Config",
        SIZES
        | dict(head_dim=256, query_pre_attn_scalar=256, sliding_window=6)
        | dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
        False,
    ),
    "gemma2-plain": ("gemma2", "Gemma2Config", SIZES | dict(head_dim=256, sliding_window=6), True),
    "gemma3": (
        "gemma3",
        "Gemma3TextConfig",
        SIZES | dict(num_hidden_layers=7, head_dim=256, query_pre_attn_scalar=256, sliding_window=6),
        True,
    ),
    "gemma3-linear": (
        "gemma3",
        "Gemma3TextConfig",
        SIZES
        | dict(num_hidden_layers=7, head_dim=12, query_pre_attn_scalar=12, sliding_window=6)
        | dict(rope_scaling=dict(rope_type="linear", factor=8.0)),
        False,
    ),
    "gemma4": (
        "gemma4",
        "Gemma4TextConfig",
        GEMMA4
        | dict(num_hidden_layers=7, layer_types=["sliding_attention", "full_attention"] * 3 + ["full_attention"])
        | dict(hidden_size_per_layer_input=10, vocab_size_per_layer_input=101, num_kv_shared_layers=3)
        | dict(use_double_wide_mlp=True),
        False,
    ),
    "gemma4-experts": (
        "gemma4",
        "Gemma4TextConfig",
        GEMMA4
        | dict(layer_types=["sliding_attention"] * 3 + ["full_attention"], hidden_size_per_layer_input=0)
        | dict(enable_moe_block=True, num_experts=5, top_k_experts=2, moe_intermediate_size=20),
        False,
    ),
    "gemma4-same": (
        "gemma4",
        "Gemma4TextConfig",
        GEMMA4
        | dict(num_global_key_value_heads=1, attention_k_eq_v=True, hidden_size_per_layer_input=0)
        | dict(layer_types=["sliding_attention", "full_attention"] * 2, tie_word_embeddings=False)
        | dict(
            rope_parameters=dict(
                full_attention=dict(rope_type="proportional", partial_rotary_factor=0.5, rope_theta=1e5),
                sliding_attention=dict(rope_type="default", rope_theta=1e3),
            )
        ),
        False,
    ),
    "gemma4-unified": (
        "gemma4",
        "Gemma4UnifiedTextConfig",
        GEMMA4 | dict(layer_types=["sliding_attention", "full_attention"] * 2),
        False,
    ),
    "phi3": ("phi3", "Phi3Config", SIZES | dict(pad_token_id=0, sliding_window=9), False),
    "phi3-partial": ("phi3", "Phi3Config", SIZES | dict(pad_token_id=0, partial_rotary_factor=0.5), False),
    "phi3-plain": ("phi3", "Phi3Config", SIZES | dict(pad_token_id=0), True),
    "phi3-longrope": (
        "phi3",
        "Phi3Config",
        SIZES | dict(pad_token_id=0, original_max_position_embeddings=16, rope_parameters=LONGROPE),
        False,
    ),
    "granite": (
        "granite",
        "GraniteConfig",
        SIZES
        | dict(embedding_multiplier=12.0, logits_scaling=8.0, residual_multiplier=0.22, attention_multiplier=0.2)
        | dict(attention_bias=True),
        False,
    ),
    "granitemoe": (
        "granitemoe",
        "GraniteMoeConfig",
        SIZES
        | dict(embedding_multiplier=12.0, logits_scaling=8.0, residual_multiplier=0.22, attention_multiplier=0.2)
        | dict(num_local_experts=5, num_experts_per_tok=2),
        False,
    ),
    "smollm3": ("smollm3", "SmolLM3Config", SIZES | dict(num_hidden_layers=5, pad_token_id=0), False),
    "olmo2": ("olmo2", "Olmo2Config", SIZES, False),
    "olmo3": (
        "olmo2",
        "Olmo3Config",
        SIZES
        | dict(num_hidden_layers=5, sliding_window=6)
        | dict(rope_parameters=dict(full_attention=YARN, sliding_attention=dict(rope_type="default", rope_theta=1e4))),
        False,
    ),
    "arcee": ("arcee", "ArceeConfig", SIZES | dict(head_dim=20), False),
    "seed_oss": ("seed_oss", "SeedOssConfig", SIZES | dict(head_dim=20), False),
    "exaone4": ("exaone4", "Exaone4Config", SIZES | dict(num_hidden_layers=5, sliding_window=6), False),
    "exaone4-full": (
        "exaone4",
        "Exaone4Config",
        SIZES
        | dict(sliding_window=None, layer_types=["full_attention"] * 4, tie_word_embeddings=True)
        | dict(max_position_embeddings=16384)
        | dict(rope_parameters=LLAMA3 | dict(original_max_position_embeddings=8192)),
        False,
    ),
    "hunyuan-dense": (
        "hunyuan-dense",
        "HunYuanDenseV1Config",
        SIZES | dict(head_dim=10, rope_parameters=dict(rope_type="dynamic", alpha=16.0, factor=1.0, rope_theta=1e4)),
        False,
    ),
    "ernie4_5": ("ernie4_5", "Ernie4_5Config", SIZES | dict(head_dim=10), False),
    "chatglm": ("chatglm", "GlmConfig", SIZES | dict(head_dim=8, pad_token_id=0), False),
    "glm4": ("glm4", "Glm4Config", SIZES | dict(head_dim=12, pad_token_id=0), False),
    "gpt_oss": ("gpt-oss", "GptOssConfig", SIZES | GPT_OSS | dict(rope_parameters=YARN | dict(truncate=False)), False),
    "gpt_oss-unscaled": (
        "gpt-oss",
        "GptOssConfig",
        SIZES | GPT_OSS | dict(rope_parameters=dict(rope_type="default", rope_theta=1e4)),
        False,
    ),
    "qwen3_next": ("qwen3next", "Qwen3NextConfig", DELTA | SHARED, False),
    "qwen3_5": ("qwen35", "Qwen3_5TextConfig", DELTA | dict(tie_word_embeddings=True), False),
    "qwen3_5-uneven": (
        "qwen35",
        "Qwen3_5TextConfig",
        DELTA | dict(layer_types=["full_attention", "linear_attention"] * 2 + ["linear_attention"]),
        False,
    ),
    "qwen3_5_moe": (
        "qwen35moe",
        "Qwen3_5MoeTextConfig",
        {
            name: value
            for name, value in (DELTA | SHARED).items()
            if name not in ("intermediate_size", "norm_topk_prob")
        },
        False,
    ),
    "lfm2": (
        "lfm2",
        "Lfm2Config",
        SIZES | dict(layer_types=["conv", "conv", "full_attention", "conv"], block_multiple_of=20, conv_L_cache=4),
        True,
    ),
    "deepseek_v3": (
        "deepseek2",
        "DeepseekV3Config",
        LATENT
        | dict(n_routed_experts=8, n_group=4, topk_group=2, first_k_dense_replace=2)
        | dict(rope_parameters=YARN | dict(mscale=0.7, mscale_all_dim=0.7)),
        False,
    ),
    "deepseek_v3-plain": (
        "deepseek2",
        "DeepseekV3Config",
        LATENT | dict(n_routed_experts=5, n_group=1, topk_group=1, first_k_dense_replace=0, q_lora_rank=None),
        False,
    ),
    "glm4_moe_lite": (
        "deepseek2",
        "Glm4MoeLiteConfig",
        LATENT | dict(n_routed_experts=5, v_head_dim=14, n_shared_experts=2),
        False,
    ),
    "mistral4": (
        "mistral4",
        "Mistral4Config",
        LATENT
        | dict(n_routed_experts=8, n_group=4, topk_group=2, first_k_dense_replace=1)
        | dict(rope_parameters=GROWING),
        False,
    ),
    "starcoder2": ("starcoder2", "Starcoder2Config", SIZES, False),
    "gpt2": ("gpt2", "GPT2Config", GPT2, True),
    "gpt2-untied": ("gpt2", "GPT2Config", GPT2 | dict(n_inner=50, tie_word_embeddings=False), False),
    "gptneox": ("gptneox", "GPTNeoXConfig", NEOX | dict(rotary_pct=0.5), False),
    "gptneox-serial": (
        "gptneox",
        "GPTNeoXConfig",
        NEOX | dict(use_parallel_residual=False, tie_word_embeddings=True, rotary_pct=1.0),
        False,
    ),
}
# Second cases of a family, which take the slow suite's time.
SECOND = (
    "qwen3_5-uneven",
    "gemma4-same",
    "gemma4-unified",
    "ministral3-plain",
    "deepseek_v3-plain",
    "gpt_oss-unscaled",
)
# Second cases whose settings and tensors, which are compared too, say all: a model of them has the first one's names.
ALIKE = {case for case in CASES if case.partition("-")[0] in CASES and "-" in case} - {"gemma4-experts"}


def each(cases, slow=SECOND):
    return [pytest.param(case, marks=pytest.mark.slow) if case in slow else case for case in cases]


# What jlora's config may say otherwise than transformers' config, which computes the same.
EQUIVALENT = {"mistral": "llama", "gemma4_unified_text": "gemma4_text", "glm4_moe_lite": "deepseek_v3"}


@functools.cache
def reference(case):
    """transformers' model with random weights everywhere, norms and biases too."""
    _, name, fields, _ = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**copy.deepcopy(fields), attn_implementation="eager")
    # Of Mistral 4, transformers' auto classes know only the model that also sees.
    model = (
        getattr(transformers, FAMILIES[config.model_type].class_name)
        ._from_config(config, attn_implementation="eager")
        .eval()
    )
    with torch.no_grad():
        scalars = [(key, value) for key, value in model.named_buffers() if key.endswith("layer_scalar")]
        for key, value in (*model.named_parameters(), *scalars):
            plus_one = "gemma" in case and "gemma4" not in case
            center = 1.0 if not plus_one and ("norm" in key or "ln_" in key or "scal" in key) else 0.0
            value.copy_(center + 0.3 * torch.randn_like(value))
    return model


def rope_parameters(config):
    nested = config.rope_parameters or {}
    return nested.get("full_attention", nested)


def write_common(writer, config):
    """What llama.cpp's converter writes for most architectures."""
    rope = rope_parameters(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        settings = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
        for name, key in (settings | {"attention_factor": "yarn_attn_factor"}).items():
            if rope.get(name) is not None:
                getattr(writer, f"add_rope_scaling_{key}")(rope[name])
    if getattr(config, "head_dim", None) is not None:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)


def write_llama(writer, config):
    write_common(writer, config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    if hasattr(config, "num_local_experts"):
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)


def write_mistral3(writer, config):
    write_llama(writer, config)
    if over := config.rope_parameters.get("mscale_all_dim"):
        writer.add_rope_scaling_yarn_log_mul(over)
    writer.add_attn_temperature_scale(config.rope_parameters["llama_4_scaling_beta"])


def write_qwen3moe(writer, config):
    write_common(writer, config)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def write_gpt_oss(writer, config):
    write_common(writer, config)
    writer.add_sliding_window(config.sliding_window)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.intermediate_size)


def write_delta(writer, config):
    """Qwen 3 Next's, and 3.5's, of which the mixtures have no dense layers."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope_parameters(config)["rope_theta"])
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    if hasattr(config, "intermediate_size"):
        writer.add_feed_forward_length(config.intermediate_size)
    if hasattr(config, "num_experts_per_tok"):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
    writer.add_array(
        f"{writer.arch}.attention.recurrent_layers", [kind == "linear_attention" for kind in config.layer_types]
    )
    writer.add_full_attention_interval(4)
    writer.add_rope_dimension_count(int(config.head_dim * rope_parameters(config)["partial_rotary_factor"]))
    if config.model_type != "qwen3_next":
        writer.add_rope_dimension_sections([11, 11, 10, 0])


def write_lfm2(writer, config):
    """Layers with convolutions have no heads of keys, and the MLP's width is the one that config.json leads to."""
    write_common(writer, config)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_head_count_kv([config.num_key_value_heads if kind != "conv" else 0 for kind in config.layer_types])
    writer.add_feed_forward_length(
        -(-int(2 * config.intermediate_size / 3) // config.block_multiple_of) * config.block_multiple_of
    )
    writer.add_vocab_size(config.vocab_size)
    writer.add_shortconv_l_cache(config.conv_L_cache)


def write_latent(writer, config):
    """Of Mistral 4's, how queries grow is said as the converter for Mistral's own files says it."""
    fields = config.to_dict() | {"num_key_value_heads": 1, "head_dim": None}
    config = types.SimpleNamespace(**fields)
    write_common(writer, config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_leading_dense_block_count(fields.get("first_k_dense_replace", 1))
    if config.q_lora_rank:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_group_count(config.n_group)
    writer.add_expert_group_used_count(config.topk_group)
    if config.model_type != "mistral4":
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    rope = rope_parameters(config)
    if rope.get("mscale_all_dim") is not None:
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
    if beta := rope.get("llama_4_scaling_beta"):
        writer.add_attn_temperature_scale(beta)
        writer.add_attn_temperature_length(rope["original_max_position_embeddings"])


def write_gemma2(writer, config):
    write_common(writer, config)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)


def write_gemma3(writer, config):
    write_common(writer, config)
    writer.add_sliding_window(config.sliding_window)


def write_gemma4(writer, config):
    """Sizes without a suffix are those of layers without a window."""
    config = types.SimpleNamespace(**config.to_dict())  # the config itself refuses to tell what differs by layer
    write_gemma3(writer, config)
    sliding = [kind == "sliding_attention" for kind in config.layer_types]
    full = config.per_layer_config.get(str(sliding.index(False)), {})
    full_dim, full_keys = full.get("head_dim", config.head_dim), full.get("num_key_value_heads")
    shared = config.num_kv_shared_layers
    writer.add_shared_kv_layers(shared)
    writer.add_embedding_length_per_layer_input(getattr(config, "hidden_size_per_layer_input", 0))
    writer.add_sliding_window_pattern(sliding)
    for dim, suffix in ((full_dim, ""), (config.head_dim, "_swa")):
        for name in ("key_length", "value_length", "rope_dimension_count"):
            getattr(writer, f"add_{name}{suffix}")(dim)
    if getattr(config, "use_double_wide_mlp", False):
        width = config.intermediate_size
        writer.add_feed_forward_length([width] * (len(sliding) - shared) + [2 * width] * shared)
    if full_keys is not None:
        writer.add_head_count_kv([config.num_key_value_heads if slides else full_keys for slides in sliding])
    if getattr(config, "enable_moe_block", False):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.top_k_experts)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    turned = int(full_dim * config.rope_parameters["full_attention"]["partial_rotary_factor"] / 2)
    divisors = [1.0] * turned + [1e30] * (full_dim // 2 - turned)
    writer.add_tensor("rope_freqs.weight", np.array(divisors, np.float32))


def write_olmo2(writer, config):
    write_common(writer, config)
    if window := getattr(config, "sliding_window", None):  # OLMo 3's
        writer.add_sliding_window(window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])


def write_hunyuan(writer, config):
    rope = rope_parameters(config)
    dim = config.head_dim
    stretched = {"rope_type": "default", "rope_theta": rope["rope_theta"] * rope["alpha"] ** (dim / (dim - 2))}
    write_common(writer, type(config)(**config.to_dict() | {"rope_parameters": stretched}))
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    writer.add_rope_scaling_factor(1)


def write_glm(writer, config):
    write_common(writer, config)
    writer.add_rope_dimension_count(int(config.head_dim * rope_parameters(config)["partial_rotary_factor"]))


def write_starcoder2(writer, config):
    write_common(writer, config)
    writer.add_layer_norm_eps(config.norm_epsilon)


def write_exaone4(writer, config):
    write_common(writer, config)
    if config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])


def write_granite(writer, config):
    write_llama(writer, config)
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def write_phi3(writer, config):
    rope = rope_parameters(config)
    head_dim = config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(int(rope.get("partial_rotary_factor", 1.0) * head_dim))
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_sliding_window(config.sliding_window or 0)
    if "long_factor" in rope:
        scale = math.log(config.max_position_embeddings / config.original_max_position_embeddings)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + scale / math.log(config.original_max_position_embeddings)))
        writer.add_tensor("rope_factors_long.weight", np.array(rope["long_factor"], np.float32))
        writer.add_tensor("rope_factors_short.weight", np.array(rope["short_factor"], np.float32))


def write_gpt2(writer, config):
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def write_gptneox(writer, config):
    head_dim = config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_rope_dimension_count(int(rope_parameters(config)["partial_rotary_factor"] * head_dim))
    writer.add_head_count(config.num_attention_heads)
    writer.add_parallel_residual(config.use_parallel_residual)
    writer.add_layer_norm_eps(config.layer_norm_eps)


METADATA = {
    "llama": write_llama,
    "arcee": write_llama,
    "exaone4": write_exaone4,
    "hunyuan-dense": write_hunyuan,
    "chatglm": write_glm,
    "glm4": write_glm,
    "starcoder2": write_starcoder2,
    "smollm3": write_llama,
    "olmo2": write_olmo2,
    "granite": write_granite,
    "granitemoe": write_granite,
    "mistral3": write_mistral3,
    "gpt-oss": write_gpt_oss,
    **dict.fromkeys(("qwen3next", "qwen35", "qwen35moe"), write_delta),
    "qwen3moe": write_qwen3moe,
    "gemma2": write_gemma2,
    "gemma3": write_gemma3,
    "deepseek2": write_latent,
    "mistral4": write_latent,
    "lfm2": write_lfm2,
    "gemma4": write_gemma4,
    "phi3": write_phi3,
    "gpt2": write_gpt2,
    "gptneox": write_gptneox,
}


def interleaved(array, heads):
    """The two halves of each head's rows, taken in turns."""
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def laid_out(architecture, config, name, array):
    """[(name, array)] with what llama.cpp's converter changes about a tensor."""
    module = name.split(".")[-2] if "." in name else name
    if architecture in ("llama", "granite", "granitemoe", "smollm3", "arcee", "mistral3") and module in (
        "q_proj",
        "k_proj",
    ):
        heads = config.num_attention_heads if module == "q_proj" else config.num_key_value_heads
        return [(name, interleaved(array, heads))]
    if architecture == "gemma4":
        names = {"layer_scalar": "layer_scalar.weight", "router.scale": "router.proj.scale"}
        names |= {"router.per_expert_scale": "experts.down_proj.scale"}
        names |= {f"experts.{kernel}": f"experts.{kernel}.weight" for kernel in ("gate_up_proj", "down_proj")}
        own = re.sub(r"^model\.layers\.\d+\.", "", name)
        return [(name.removesuffix(own) + names.get(own, own), array)]
    if module == "kv_b_proj":  # transposed keys, and values
        heads = array.reshape(config.num_attention_heads, -1, array.shape[1])
        keys, values = np.split(heads, [config.qk_nope_head_dim], axis=1)
        return [(name.replace("kv_b", "k_b"), keys.swapaxes(1, 2)), (name.replace("kv_b", "v_b"), values)]
    if architecture == "mistral4" and "experts." in name and not name.endswith(".weight"):
        return [(f"{name}.weight", array)]
    if name.endswith("e_score_correction_bias"):
        return [(name.replace("_bias", ".bias"), array)]
    if architecture == "lfm2" and module == "conv":
        return [(name, array.squeeze(1))]
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return [(name, array + 1)]
    if architecture == "gpt2" and module in ("c_attn", "c_proj", "c_fc") and name.endswith("weight"):
        return [(name, array.T)]
    if architecture == "gptneox" and module == "query_key_value":
        heads = array.reshape(config.num_attention_heads, 3, -1, *array.shape[1:])
        return [(name, np.concatenate([heads[:, i].reshape(-1, *array.shape[1:]) for i in range(3)]))]
    if architecture == "gpt-oss":
        return of_gpt_oss(name, array)
    if architecture in ("qwen3next", "qwen35", "qwen35moe"):
        found = of_delta(config, name, array)
        if found is not None:
            return found
    if architecture == "granitemoe" and "block_sparse_moe" in name:
        name = name.replace("router", "router.layer").replace("block_sparse_moe.experts", "mlp.experts")
    if name.endswith("experts.gate_up_proj"):
        stem, (gate, up) = name.removesuffix("gate_up_proj"), np.split(array, 2, axis=1)
        return [(f"{stem}gate_proj.weight", gate), (f"{stem}up_proj.weight", up)]
    if name.endswith("experts.down_proj"):
        return [(f"{name}.weight", array)]
    return [(name, array)]


def of_gpt_oss(name, array):
    """Rows of gate and up alternate, and kernels are [E, in, out]."""
    array = array.swapaxes(1, 2) if name.endswith(("experts.gate_up_proj", "experts.down_proj")) else array
    stem, _, last = name.rpartition(".")
    kind = "bias" if last.endswith("_bias") else "weight"
    if last.startswith("gate_up_proj"):
        return [(f"{stem}.{part}_proj.{kind}", array[:, i::2]) for i, part in enumerate(("gate", "up"))]
    if last in ("down_proj", "down_proj_bias"):
        return [(f"{stem}.down_proj.{kind}", array)]
    return [(f"{name}.weight" if last == "sinks" else name, array)]


def of_delta(config, name, array):
    """Qwen 3.5's value heads: the first of each key head, the second of each, …; Qwen 3 Next's stay in their order."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    key_dim, value_dim, ratio = config.linear_key_head_dim, config.linear_value_head_dim, values // keys
    module = name.removesuffix(".weight").rpartition(".")[2]
    if name.endswith("norm.weight"):
        return [(name, array if "linear_attn" in name else array + 1)]
    if module == "in_proj_qkvz":
        groups = array.reshape(keys, -1, array.shape[1])
        ends = np.cumsum([key_dim, key_dim, ratio * value_dim])
        q, k, v, z = (part.reshape(-1, array.shape[1]) for part in np.split(groups, ends, axis=1))
        mixed = np.concatenate([q, k, v])
        return [(name.replace("qkvz", "qkv"), mixed), (name.replace("qkvz", "z"), z)]
    if module not in ("A_log", "dt_bias", "conv1d", "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"):
        return None
    # The new place of each row (or column) of heads of width `width`, from `first` on.
    width = 1 if module in ("A_log", "dt_bias", "in_proj_a", "in_proj_b") else value_dim
    first = 2 * keys * key_dim if module in ("conv1d", "in_proj_qkv") else 0
    order = [*range(first)]
    for i in range(ratio):
        for key in range(keys):
            start = first + (key * ratio + i) * width
            order += range(start, start + width)
    if config.model_type == "qwen3_next":
        order = sorted(order)
    array = array[:, order] if module == "out_proj" else array[order]
    if module == "A_log":
        array = -np.exp(array)
    if module == "conv1d":
        array = array.squeeze()
    return [(name.replace(".dt_bias", ".dt_proj.bias"), array)]


def llama3_divisors(config):
    """What Llama 3's rule divides each rotary frequency by."""
    rope, dim = rope_parameters(config), getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    wavelengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    low, high, context = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    smooth = (context / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / rope["factor"] + smooth)
    divisors = np.where(wavelengths > context / low, rope["factor"], between)
    return np.where(wavelengths < context / high, 1, divisors).astype(np.float32)


def write(path, case, *, change=lambda writer: None):
    """The reference model of `case` as a GGUF file; `change` may add to it."""
    architecture = CASES[case][0]
    model = reference(case)
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    if config.pad_token_id is not None:
        writer.add_pad_token_id(config.pad_token_id)
    METADATA.get(architecture, write_common)(writer, config)
    table = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config.num_hidden_layers
    )
    if (config.rope_parameters if architecture != "gpt2" else {}).get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(config))
    for hub_name, value in model.state_dict().items():
        if config.tie_word_embeddings and hub_name in ("lm_head.weight", "embed_out.weight"):
            continue
        for name, array in laid_out(architecture, config, hub_name, value.numpy()):
            target = table.get_name(name, try_suffixes=(".weight", ".bias", ".scale"))
            assert target, name
            writer.add_tensor(target, np.ascontiguousarray(array))
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """case → the GGUF file of its reference model."""
    return functools.cache(lambda case: write(tmp_path_factory.mktemp(case) / "model.gguf", case))


@pytest.fixture(scope="module")
def load(files):
    return functools.cache(lambda case: jlora.load(files(case)))


def tokens(rows=2, length=21):
    return np.random.default_rng(1).integers(1, 101, (rows, length))


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.from_numpy(ids), use_cache=False).logits.numpy()


def difference(ours, theirs):
    """The largest difference, relative to the largest value."""
    return float(np.max(np.abs(np.asarray(ours) - theirs)) / np.max(np.abs(theirs)))


@pytest.mark.parametrize("case", each(CASES, ALIKE))
def test_logits(case, load, parity):
    model, params = load(case)
    ids = tokens()
    found = difference(model(params, jnp.asarray(ids)), logits_of(reference(case), ids))
    parity("format", f"GGUF, {case.partition('-')[0]}", "in", found)
    assert found < 1e-4


@pytest.mark.parametrize("case", [case for case, (*_, readable) in CASES.items() if readable])
def test_logits_of_transformers_reading_the_same_file(case, files, load):
    model, params = load(case)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        files(case).parent, gguf_file="model.gguf", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = tokens()
    assert difference(model(params, jnp.asarray(ids)), logits_of(theirs, ids)) < 1e-4


@pytest.mark.parametrize("case", each(CASES))
def test_config_is_read_as_the_one_it_was_written_from(case, files, tmp_path):
    """jlora reads the same ModelConfig from the GGUF file and from the folder that transformers saves."""
    reference(case).config.save_pretrained(tmp_path)
    expected = models.build(json.loads((tmp_path / "config.json").read_text())).config
    found = models.build(GGUFFile(files(case)).config).config
    fields = {name: value for name, value in vars(expected).items() if name not in ("source", "eos_token_ids")}
    if fields["model_type"] in EQUIVALENT:
        fields |= {"model_type": EQUIVALENT[fields["model_type"]], "names": found.names}
    for name, value in fields.items():
        assert getattr(found, name) == value, name


@pytest.mark.parametrize("case", each(CASES, ALIKE))
def test_transformers_reads_the_config(case, load, tmp_path):
    """What jlora saves of a model that came from GGUF, transformers opens, with the same logits."""
    model, params = load(case)
    jlora.save_model(tmp_path, model, params)
    (name,) = transformers.AutoConfig.from_pretrained(tmp_path).architectures
    opened = getattr(transformers, name).from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids = tokens()
    assert difference(logits_of(opened, ids), logits_of(reference(case), ids)) < 1e-4


# All that gguf unpacks.
FILE_TYPES = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("TQ1_0", "TQ2_0", "MXFP4", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
    *("IQ4_NL", "IQ4_XS", "NVFP4"),
)


def write_tensors(path, architecture, metadata, tensors):
    """A GGUF file of raw bytes: name → (bytes [..., row], type)."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        writer.add_key_value(f"{architecture}.{key}", value, gguf.GGUFValueType.get_type(value))
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile(path)


@pytest.mark.parametrize("name", FILE_TYPES)
def test_values_are_those_of_gguf(name, tmp_path):
    """Of whole tensors, of rows in another order, and of one expert among several."""
    kind = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    # Bytes below 0x3c are finite numbers in every type.
    raw = np.random.default_rng(0).integers(0, 0x3C, (3, 8, 256 // block * size), dtype=np.uint8)
    stored = raw.view({"F32": np.float32, "F16": np.float16}.get(name, np.uint8))
    expected = gguf.quants.dequantize(stored, kind)
    assert expected.shape == (3, 8, 256) and np.any(expected)
    metadata = MINIMAL | {"expert_count": 3, "expert_used_count": 2}
    tensors = {
        "token_embd.weight": (stored[0], kind),
        "blk.0.attn_q.weight": (stored[1], kind),
        "blk.0.ffn_up_exps.weight": (stored, kind),
    }
    file = write_tensors(tmp_path / "tiny.gguf", "llama", metadata, tensors)
    np.testing.assert_array_equal(file.read("model.embed_tokens.weight"), expected[0])
    rows = [0, 2, 1, 3, 4, 6, 5, 7]
    np.testing.assert_array_equal(file.read("model.layers.0.self_attn.q_proj.weight"), expected[1][rows])
    for expert in range(3):
        expert_name = f"model.layers.0.block_sparse_moe.experts.{expert}.w3.weight"
        assert file.tensors[expert_name].shape == (8, 256)
        np.testing.assert_array_equal(file.read(expert_name), expected[expert])


MINIMAL = {
    "embedding_length": 48,
    "feed_forward_length": 80,
    "block_count": 4,
    "attention.head_count": 2,
    "context_length": 64,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
RECURRENT = {
    **{f"attention.{part}_length": 8 for part in ("key", "value")},
    **{f"ssm.{name}": size for name, size in dict(conv_kernel=3, state_size=8, group_count=2).items()},
    "ssm.time_step_rank": 4,
    "ssm.inner_size": 32,
    "rope.dimension_count": 4,
}
EMBEDDING = {"token_embd.weight": (np.ones((4, 32), np.float32), None)}


@pytest.mark.parametrize(
    ("architecture", "metadata", "expected"),
    [
        ("llama", {"attention.sliding_window": 7}, {"model_type": "mistral", "sliding_window": 7}),
        (
            "llama",
            {"expert_count": 4, "expert_used_count": 2, "attention.sliding_window": 7},
            {"model_type": "mixtral", "sliding_window": 7, "num_local_experts": 4},
        ),
        ("llama", {"attention.head_count_kv": [1, 1, 1, 1]}, {"model_type": "llama", "num_key_value_heads": 1}),
        ("llama", {"rope.scale_linear": 4.0}, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ("llama", {"attention.causal": True, "expert_count": 0, "logit_scale": 0.0}, {"model_type": "llama"}),
        # llama.cpp tells the largest Gemmas, whose scores are scaled otherwise, by their depth.
        ("gemma2", {"block_count": 46, "attention.key_length": 16}, {"query_pre_attn_scalar": 24}),
        ("gemma2", {"block_count": 42, "attention.key_length": 16}, {"query_pre_attn_scalar": 16}),
        ("gemma3", {"block_count": 62, "attention.key_length": 16}, {"query_pre_attn_scalar": 24}),
        ("gemma2", {}, {"sliding_window": 4096, "layer_types": ["sliding_attention", "full_attention"] * 2}),
        ("gemma3", {}, {"layer_types": ["full_attention"] * 4}),
        (
            "gemma3",
            {"attention.sliding_window": 7, "attention.sliding_window_pattern": [True, False, False, True]},
            {"layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]},
        ),
        (
            "gemma3",
            {"attention.sliding_window": 7, "attention.sliding_window_pattern": 3, "rope.freq_base_swa": 5000.0},
            {
                "layer_types": ["sliding_attention"] * 2 + ["full_attention", "sliding_attention"],
                "rope_local_base_freq": 5000.0,
            },
        ),
        (
            "olmo2",
            {"attention.sliding_window": 7, "rope.freq_base": 5e5},
            {
                "model_type": "olmo3",
                "sliding_window": 7,
                "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 5e5},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
                },
            },
        ),
        ("olmo2", {"attention.sliding_window": 0}, {"model_type": "olmo2"}),
        ("phi3", {"attention.sliding_window": 0, "rope.dimension_count": 18}, {"partial_rotary_factor": 0.75}),
        (
            "qwen35",
            RECURRENT | {"full_attention_interval": 2},
            {"layer_types": ["linear_attention", "full_attention"] * 2, "partial_rotary_factor": 0.5},
        ),
        (
            "qwen35",
            RECURRENT | {"nextn_predict_layers": 1, "attention.recurrent_layers": [False, True, True, False]},
            {"num_hidden_layers": 3, "layer_types": ["full_attention", "linear_attention", "linear_attention"]},
        ),
    ],
)
def test_what_follows_from_metadata(architecture, metadata, expected, tmp_path):
    config = write_tensors(tmp_path / "tiny.gguf", architecture, MINIMAL | metadata, EMBEDDING).config
    assert {name: config.get(name) for name in expected} == expected
    models.build(config)


@pytest.mark.parametrize(("turned", "head_dim"), [(30, 44), (60, 88), (26, 90)])
def test_the_share_of_a_head_that_is_turned(turned, head_dim, tmp_path):
    """Plain division gives shares of which int(head_dim · share) is one too few."""
    assert int(head_dim * (turned / head_dim)) != turned
    metadata = MINIMAL | {"embedding_length": 2 * head_dim, "rope.dimension_count": turned}
    config = write_tensors(tmp_path / "tiny.gguf", "phi3", metadata, EMBEDDING).config
    assert models.build(config).config.ropes[0].dim == turned


def test_longrope_with_a_factor_of_its_own(tmp_path):
    factors = {f"rope_factors_{name}.weight": (np.full(12, 2.0, np.float32), None) for name in ("short", "long")}
    metadata = MINIMAL | {"rope.scaling.original_context_length": 16, "rope.scaling.attn_factor": 1.25}
    config = write_tensors(tmp_path / "tiny.gguf", "phi3", metadata, EMBEDDING | factors).config
    assert config["rope_scaling"] == {
        "rope_type": "longrope",
        "short_factor": [2.0] * 12,
        "long_factor": [2.0] * 12,
        "attention_factor": 1.25,
    }
    assert models.build(config).config.ropes[0].attention_factor == 1.25


@pytest.mark.parametrize(
    ("architecture", "metadata", "message"),
    [
        ("llama", {"block_count": None, "context_length": None}, r"no metadata llama\.block_count\n.*llama\.context_l"),
        ("llama", {"attention.head_count": 0}, r"llama\.attention\.head_count is 0"),
        ("gptneox", {}, r"no metadata gptneox\.attention\.layer_norm_epsilon\n.*gptneox\.use_parallel_residual"),
        ("qwen3moe", {}, r"no metadata qwen3moe\.expert_used_count"),
        ("granite", {}, r"no metadata granite\.attention\.scale\n.*granite\.logit_scale"),
        ("mamba", {}, "has architecture 'mamba'; GGUF is read for llama, "),
        ("llama", {"rope.scaling.type": "su"}, r"llama\.rope\.scaling\.type is 'su'; linear, yarn"),
        ("llama", {"rope.scaling.type": "longrope"}, r"llama\.rope\.scaling\.type is 'longrope'; linear, yarn"),
        ("llama", {"rope.scaling.type": "yarn"}, r"no metadata llama\.rope\.scaling\.original_context_length"),
        (
            "llama",
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 2.0,
                "rope.scaling.original_context_length": 32,
                "rope.scaling.yarn_log_multiplier": 0.1,
                "rope.scaling.yarn_ext_factor": 0.5,
            },
            r"yarn_ext_factor is 0\.5; jlora computes only 1\.0 or -1\.0\n.*yarn_log_multiplier is 0\.1",
        ),
        ("llama", {"rope.scaling.attn_factor": 1.5}, r"llama\.rope\.scaling\.attn_factor is 1\.5"),
        ("llama", {"rope.dimension_count": 8, "attention.key_length": 16}, r"rope\.dimension_count: 8 of 16 values"),
        ("llama", {"attention.value_length": 8}, r"llama\.attention\.value_length is 8; jlora computes only 24"),
        ("llama", {"attention.head_count_kv": [1, 2, 1, 1]}, r"head_count_kv differs from layer to layer"),
        ("llama", {"attention.causal": False}, r"llama\.attention\.causal is False; jlora computes only True"),
        ("llama", {"logit_scale": 0.5}, r"llama\.logit_scale is 0\.5, which is not supported"),
        ("llama", {"attention.scale": 0.5}, r"llama\.attention\.scale is 0\.5, which is not supported"),
        ("granite", {"rope.scaling.finetuned": False}, r"granite\.rope\.scaling\.finetuned is False"),
        ("olmo2", {"attention.sliding_window_pattern": 4}, r"olmo2\.attention\.sliding_window_pattern is 4, which"),
        (
            "olmo2",
            {"attention.sliding_window": 8, "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4},
            r"olmo2\.rope\.freq_base_swa is 10000\.0; jlora computes only 1000000\.0",
        ),
        ("qwen3moe", {"expert_gating_func": 2}, r"qwen3moe\.expert_gating_func is 2; jlora computes only 0 or 1"),
        ("qwen3moe", {"expert_shared_count": 1}, r"qwen3moe\.expert_shared_count is 1, which is not supported"),
        ("qwen35", RECURRENT | {"ssm.inner_size": 64}, r"qwen35\.ssm\.inner_size is 64; jlora computes only 32"),
        (
            "deepseek2",
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.original_context_length": 32},
            r"no metadata deepseek2\.expert_gating_func: (.*\n)*.*\.key_length_mla(.*\n)*.*\.yarn_log_multiplier: ",
        ),
        ("gptneox", {"attention.head_count_kv": 1}, r"gptneox\.attention\.head_count_kv is 1; jlora computes only 2"),
        ("gpt2", {"rope.freq_base": 1e4}, r"gpt2\.rope\.freq_base is 10000\.0, which is not supported"),
    ],
)
def test_what_is_not_supported_is_named(architecture, metadata, message, tmp_path):
    chosen = {key: value for key, value in (MINIMAL | metadata).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        write_tensors(tmp_path / "tiny.gguf", architecture, chosen, EMBEDDING)


def test_half_of_longrope_and_parts_of_a_file_are_refused(tmp_path):
    half = {"rope_factors_long.weight": (np.ones(12, np.float32), None)}
    with pytest.raises(ValueError, match=r"no tensor rope_factors_short\.weight"):
        write_tensors(tmp_path / "half.gguf", "phi3", MINIMAL, EMBEDDING | half)
    with pytest.raises(ValueError, match=r"no tensor token_embd\.weight"):
        write_tensors(tmp_path / "empty.gguf", "llama", MINIMAL, half)
    part = write(tmp_path / "part.gguf", "llama", change=lambda writer: writer.add_uint16("split.count", 2))
    with pytest.raises(ValueError, match=r"split\.count is 2: merge the parts"):
        jlora.load(part)


def test_layers_that_predict_further_ahead_are_left_aside(tmp_path):
    there = np.ones((48, 48), np.float32)
    extra = {f"blk.{layer}.{name}.weight": (there, None) for layer in (2, 3) for name in ("ssm_out", "nextn.eh_proj")}
    metadata = MINIMAL | RECURRENT | {"nextn_predict_layers": 1}
    file = write_tensors(tmp_path / "tiny.gguf", "qwen35", metadata, EMBEDDING | extra)
    expected = {"model.embed_tokens.weight", "model.layers.2.linear_attn.out_proj.weight", "blk.2.nextn.eh_proj.weight"}
    assert set(file.tensors) == expected


def test_tensors_that_the_architecture_does_not_have_are_refused(tmp_path):
    extra = np.ones(48, np.float32)
    path = write(tmp_path / "extra.gguf", "llama", change=lambda w: w.add_tensor("blk.0.post_ffw_norm.weight", extra))
    with pytest.raises(ValueError, match=r"unknown blk\.0\.post_ffw_norm\.weight"):
        jlora.load(path)


# Cases that llama.cpp does not compute, and what is said of them.
REFUSED = {
    "qwen3-bias": "llama.cpp's qwen3 has biases of queries, keys and values only",
}


@pytest.mark.filterwarnings("ignore:llama.cpp has no window")  # phi3's
@pytest.mark.parametrize("case", each(case for case in CASES if case not in REFUSED))
def test_written_as_llama_cpp_lays_it_out(case, files, tmp_path):
    """What jlora writes of transformers' folder has the same tensors, and comes back as the same params."""
    reference(case).save_pretrained(tmp_path / "folder")
    model, params = jlora.load(tmp_path / "folder")
    hub.save_gguf(tmp_path / "model.gguf", model, params, dtype="f32")
    written, expected = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        for path in (tmp_path / "model.gguf", files(case))
    )
    if CASES[case][0] == "gptneox" and model.config.tie_word_embeddings:  # llama.cpp wants a head of every GPT-NeoX
        np.testing.assert_array_equal(written.pop("output.weight").data, expected["token_embd.weight"].data)
    assert set(written) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_allclose(written[name].data, tensor.data, rtol=1e-6, err_msg=name)
    again = tree.flatten(jlora.load(tmp_path / "model.gguf")[1])
    for path, leaf in tree.flatten(params).items():
        np.testing.assert_allclose(again[path], leaf, rtol=1e-6, atol=1e-6, err_msg=path)  # 1 + weight is rounded


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_does_not_compute_is_not_written(case, files, tmp_path):
    with pytest.raises(ValueError, match=REFUSED[case]):
        hub.save_gguf(tmp_path / "model.gguf", *jlora.load(files(case)))
    assert list(tmp_path.iterdir()) == []


GEMMA = dict(head_dim=4, query_pre_attn_scalar=4)


def built(**changes):
    """(a tiny Llama, random params of it: drawn on the host, as nothing of how models start counts here)."""
    sizes = dict(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2)
    model, draw = models.build(dict(model_type="llama") | sizes | changes), np.random.default_rng(0)
    return model, jax.tree.map(
        lambda leaf: jnp.asarray(draw.normal(0, 0.4, leaf.shape).astype(leaf.dtype)), model.abstract_params()
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            dict(rope_parameters=dict(rope_type="dynamic", factor=2.0)),
            "rope_type 'dynamic' would come back as 'default'",
        ),
        (dict(hidden_act="gelu"), "hidden_act 'gelu' would come back as 'silu'"),
        (dict(model_type="gemma", tie_word_embeddings=False), "gemma only the embedding's"),
        (
            dict(model_type="smollm3", num_key_value_heads=2, no_rope_layers=[1, 0, 1]),
            r"layers\[1\]\[rope\] None would come back as 0",
        ),
        (
            dict(model_type="qwen3_5_text", head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2)
            | dict(linear_key_head_dim=4, linear_value_head_dim=8),
            r"qwen35\.ssm\.inner_size is 16; jlora computes only 8",
        ),
        (
            dict(model_type="gemma4_text", head_dim=4, global_head_dim=4, num_key_value_heads=2, sliding_window=6)
            | dict(layer_types=["full_attention", "sliding_attention", "full_attention"], num_kv_shared_layers=1)
            | dict(hidden_size_per_layer_input=0),
            r"shared_kv_layers is 1; llama\.cpp then expects a window in layer 0 and none in layer 1",
        ),
        # llama.cpp's defaults are jlora's, and it has no way to cap nothing in Gemma 2 and scores in Gemma 3.
        (GEMMA | dict(model_type="gemma2", attn_logit_softcapping=None), "attention_softcap None would come .* 50.0"),
        (GEMMA | dict(model_type="gemma2", final_logit_softcapping=None), "final_softcap None would come .* 30.0"),
        (GEMMA | dict(model_type="gemma3_text", attn_logit_softcapping=9.0), "gemma3 does not cap attention's scores"),
    ],
)
def test_what_the_format_cannot_say_is_not_written(changes, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        hub.save_gguf(tmp_path / "model.gguf", *built(**changes))
    assert list(tmp_path.iterdir()) == []


def test_gemma_4_says_that_logits_are_not_capped(tmp_path):
    """Without a word, llama.cpp caps them by 30."""
    sizes = dict(num_key_value_heads=2, head_dim=4, global_head_dim=8, num_hidden_layers=4, sliding_window=6)
    model, params = built(model_type="gemma4_text", hidden_size_per_layer_input=0, **sizes)
    hub.save_gguf(tmp_path / "model.gguf", model, params)
    field = gguf.GGUFReader(tmp_path / "model.gguf").fields["gemma4.final_logit_softcapping"]
    assert field.contents() == 0 and jlora.load(tmp_path / "model.gguf")[0].config.final_softcap is None


@pytest.mark.parametrize(
    "settings",
    [
        dict(target_modules=["lm_head"]),
        dict(target_modules=["embed_tokens"]),
        dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ],
)
def test_a_tied_head_that_the_adapter_changes_alone_is_one_of_its_own(settings, tmp_path):
    model, base = built(tie_word_embeddings=True)
    params = lora.init(base, jlora.LoraConfig(r=2, init_lora_weights=False, **settings), jax.random.key(0))
    params = tree.map_with_path(lambda path, leaf: 2 * leaf if path.endswith("trained_kernel") else leaf, params)
    hub.save_gguf(tmp_path / "model.gguf", model, params, dtype="f32")
    again, read = jlora.load(tmp_path / "model.gguf")
    ids = jnp.arange(9)[None]
    expected = model(params, ids)
    assert difference(again(read, ids), expected) < 1e-5
    assert difference(model(base, ids), expected) > 1e-2


WINDOWED = {"mistral": {}, "mixtral": dict(num_local_experts=2, num_experts_per_tok=1), "phi3": {}}


@pytest.mark.parametrize("kind", WINDOWED)
def test_a_window_that_llama_cpp_does_not_compute_is_said(kind, tmp_path):
    fields = dict(model_type=kind, num_key_value_heads=2, max_position_embeddings=64) | WINDOWED[kind]
    model, params = built(**fields, sliding_window=7)
    with pytest.warns(
        UserWarning, match="llama.cpp has no window for this model: its results differ for texts of over 7 tokens"
    ):
        hub.save_gguf(tmp_path / "model.gguf", model, params)
    assert jlora.load(tmp_path / "model.gguf")[0].config.layers[0].window == 7
    for window in (64, None):  # which no text of the model's is longer than
        with warnings.catch_warnings(action="error"):
            hub.save_gguf(tmp_path / "model.gguf", *built(**fields, sliding_window=window))


def test_a_file_of_another_program_is_left_alone_until_it_is_forced(tmp_path):
    (model, params), file = built(), tmp_path / "model.gguf"
    hub.save_gguf(file, model, params, dtype="f32")
    hub.save_gguf(file, model, params)
    theirs = file.read_bytes().replace(b"jlora", b"other")
    file.write_bytes(theirs)
    with pytest.raises(FileExistsError, match="is a GGUF file that jlora did not write, so it is left alone"):
        hub.save_gguf(file, model, params)
    assert file.read_bytes() == theirs
    hub.save_gguf(file, model, params, force=True)
    hub.save_gguf(file, model, params)


def test_nothing_is_written_over_what_is_not_gguf(tmp_path):
    model, params = built()
    (tmp_path / "notes.gguf").write_text("mine")
    with pytest.raises(FileExistsError, match="is not GGUF"):
        hub.save_gguf(tmp_path / "notes.gguf", model, params)
    with pytest.raises(ValueError, match=r"ends in \.gguf"):
        hub.save_gguf(tmp_path / "model.bin", model, params)
    large = tree.map_with_path(lambda path, leaf: leaf * 1e6 if "down_proj" in path else leaf, params)
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_down\.weight: weights up to .* than float16 holds"):
        hub.save_gguf(tmp_path / "model.gguf", model, large)
    hub.save_gguf(tmp_path / "model.gguf", model, large, dtype="bf16")
    assert {path.name for path in tmp_path.iterdir()} == {"notes.gguf", "model.gguf"}
    hub.save_gguf(tmp_path / "model.gguf", model, params, dtype="q8_0")  # rows of 8: float16


@pytest.mark.parametrize("dtype", hub.GGUF_TYPES)
def test_matrices_are_rounded_once_to_the_type(dtype, tmp_path):
    """That is, to those of the table: 80 values are no whole number of blocks, 256 are one of every kind."""
    model, params = built(hidden_size=256, intermediate_size=80, head_dim=32)
    done = []
    hub.save_gguf(tmp_path / "model.gguf", model, params, dtype=dtype, progress=lambda *counts: done.append(counts))
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    written = {tensor.name: tensor for tensor in reader.tensors}
    shapes = {name: tuple(map(int, tensor.shape[::-1])) for name, tensor in written.items()}
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    types = types_of(shapes, metadata, dtype)
    assert {name: tensor.tensor_type.name for name, tensor in written.items()} == types
    assert metadata["general.file_type"] == hub.GGUF_TYPES[dtype].number
    down = types["blk.2.ffn_down.weight"]
    assert (
        down == (dtype.upper() if dtype in ("f32", "f16", "bf16") else "F16") and types["output_norm.weight"] == "F32"
    )
    assert done == [(number, len(types)) for number in range(1, len(types) + 1)]
    embedding, kind = np.asarray(params["embed_tokens"]["embedding"]), types["token_embd.weight"]
    pack = functools.partial(kquants.quantize, type=kind) if kind in kquants.KINDS else None
    expected = pack(embedding) if pack else gguf.quants.quantize(embedding, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(written["token_embd.weight"].data, expected)
    read = jlora.load(tmp_path / "model.gguf")[1]["embed_tokens"]["embedding"]
    error = np.linalg.norm(read - embedding) / np.linalg.norm(embedding)
    assert error < 2.5 * 0.5 ** int(kind[1]) if kind.startswith("Q") else error < 4e-3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(use_dora=True), "layers/self_attn/q_proj: DoRA's magnitudes; merge"),
        (dict(modules_to_save=["norm"]), "norm: a trained copy of its scale; merge"),
        (dict(trainable_token_indices=[3]), "embed_tokens: trained token rows; merge"),
    ],
)
def test_an_adapter_of_more_than_a_and_b_is_not_written(settings, said, tmp_path):
    model, params = built()
    config = jlora.LoraConfig(target_modules=["q_proj"], **settings)
    with pytest.raises(ValueError, match=said):
        hub.save_gguf_adapter(tmp_path / "adapter.gguf", model, lora.init(params, config, jax.random.key(0)))
    with pytest.raises(ValueError, match="no adapter in these params"):
        hub.save_gguf_adapter(tmp_path / "adapter.gguf", model, params)
    tied, params = built(tie_word_embeddings=True)
    for module, reason in (("embed_tokens", "the embedding is the head too"), ("lm_head", "the head is the embedding")):
        config = jlora.LoraConfig(target_modules=[module])
        with pytest.raises(ValueError, match=f"{module}: {reason}; merge"):
            hub.save_gguf_adapter(tmp_path / "adapter.gguf", tied, lora.init(params, config, jax.random.key(0)))


LATENT_SIZES = dict(kv_lora_rank=4, q_lora_rank=4, qk_nope_head_dim=2, qk_rope_head_dim=2, v_head_dim=4)
LATENT_SIZES |= dict(model_type="deepseek_v3", n_routed_experts=2, n_group=1, num_experts_per_tok=1)


@pytest.mark.parametrize(
    ("module", "fields"),
    [
        (
            "per_layer_model_projection",
            dict(model_type="gemma4_text", num_key_value_heads=2, head_dim=4, global_head_dim=4, sliding_window=6)
            | dict(hidden_size_per_layer_input=6),
        ),
        ("q_a_proj", LATENT_SIZES),
        ("kv_b_proj", LATENT_SIZES),  # which it has in two matrices
    ],
)
def test_an_adapter_where_llama_cpp_applies_none_is_not_written(module, fields, tmp_path):
    """llama.cpp would leave it out without a word."""
    model, params = built(**fields)
    adapted = lora.init(params, jlora.LoraConfig(target_modules=[module]), jax.random.key(0))
    with pytest.raises(ValueError, match=rf"{module}: llama\.cpp does not apply adapters there; merge it"):
        hub.save_gguf_adapter(tmp_path / "adapter.gguf", model, adapted)


EXPERTS = dict(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "gate.weight"])
# case → what is adapted
ADAPTERS = {
    "llama-biases": dict(target_modules="all-linear"),
    "llama-wide-heads": dict(target_modules=["q_proj", "k_proj", "lm_head", "embed_tokens"]),
    "mistral": dict(target_modules=["k_proj", "up_proj"], rank_pattern={"k_proj": 2}, layers_to_transform=[1, 3]),
    "mixtral": dict(target_modules=["v_proj"], **EXPERTS),
    "qwen3moe": dict(target_modules="all-linear", **EXPERTS),
    "gpt_oss-unscaled": dict(target_modules="all-linear", target_parameters=EXPERTS["target_parameters"][:2]),
    "qwen3_next": dict(target_modules="all-linear"),
    "qwen3_5_moe": dict(target_modules="all-linear", **EXPERTS),
    "gemma2": dict(target_modules="all-linear"),
    "gemma4-experts": dict(target_modules="all-linear"),
    "lfm2": dict(target_modules="all-linear"),
    "deepseek_v3": dict(target_modules=["o_proj", "gate_proj", "up_proj", "down_proj"]),
    "mistral4": dict(target_modules=["o_proj", "down_proj"]),
    "phi3-plain": dict(target_modules="all-linear", init_lora_weights="pissa"),
    "gpt2": dict(target_modules="all-linear"),
    "gptneox": dict(target_modules="all-linear"),
}


def with_adapter(case, folder):
    """(model, its params with an adapter), and the files base, merged and adapter of it in the folder."""
    reference(case).save_pretrained(folder / "folder")
    model, base = jlora.load(folder / "folder")
    config = jlora.LoraConfig(r=3, lora_alpha=4, **ADAPTERS[case])
    params = tree.map_with_path(
        lambda path, leaf: (
            jnp.asarray(np.asarray(leaf) + 0.1 * np.sin(np.arange(leaf.size, dtype=np.float32)).reshape(leaf.shape))
            if path.endswith(("lora_a", "lora_b"))
            else leaf
        ),
        lora.init(base, config, jax.random.key(0)),
    )
    for name, write in (("base", base), ("merged", params)):
        hub.save_gguf(folder / f"{name}.gguf", model, write, dtype="f32")
    hub.save_gguf_adapter(folder / "adapter.gguf", model, params)
    return model, params


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_is_what_it_adds_to_the_base(case, tmp_path):
    """File of the base + alpha / rank · B @ A of the adapter's file = the file of the merged model."""
    with_adapter(case, tmp_path)
    files = {name: gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in ("base", "merged", "adapter")}
    read = {name: {tensor.name: tensor.data for tensor in file.tensors} for name, file in files.items()}
    alpha = files["adapter"].fields["adapter.lora.alpha"].contents()
    adapted = {name.rpartition(".")[0] for name in read["adapter"]}
    assert adapted == {name for name in read["base"] if np.any(read["base"][name] != read["merged"][name])}
    for name in adapted:
        a, b = (read["adapter"][f"{name}.{side}"] for side in ("lora_a", "lora_b"))
        delta = a @ b.T if name == "token_embd.weight" else b @ a
        expected = read["base"][name] + alpha / b.shape[-1] * delta
        np.testing.assert_allclose(read["merged"][name], expected, rtol=1e-5, atol=2e-6, err_msg=name)


def test_an_adapter_that_is_switched_off_adds_nothing(tmp_path):
    """llama.cpp takes an alpha of 0 for none, and would add B @ A as it is."""
    model, base = built()
    config = jlora.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    params = lora.scaled(lora.init(base, config, jax.random.key(0)), 0)
    hub.save_gguf_adapter(tmp_path / "adapter.gguf", model, params)
    file = gguf.GGUFReader(tmp_path / "adapter.gguf")
    assert file.fields["adapter.lora.alpha"].contents() > 0
    assert {tensor.name.rpartition(".")[2]: np.any(tensor.data) for tensor in file.tensors} == {
        "lora_a": True,
        "lora_b": False,
    }


# Cases that llama.cpp computes otherwise than transformers, with the reason.
ELSEWISE = {
    "phi3": "it has switched Phi-3's window off",
    "gpt_oss": "it rounds the bounds of YaRN's ramp",
    "exaone4": "it tells by the 64 layers of the 32B whether there are windows, and layers without positions",
}


def logits_of_llama_cpp(model, ids):
    """[B, T, V] of rows of tokens."""
    rows = []
    for row in ids:
        model.reset()
        model.eval(row.tolist())
        rows.append(np.array(model.scores[: len(row)]))
    return np.stack(rows)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in ELSEWISE | REFUSED])
def test_llama_cpp_gives_the_same_logits(case, tmp_path, llama_cpp, parity):
    reference(case).save_pretrained(tmp_path / "folder")
    model, params = jlora.load(tmp_path / "folder")
    hub.save_gguf(tmp_path / "model.gguf", model, params, dtype="f32")
    ids = tokens()
    found = difference(model(params, jnp.asarray(ids)), logits_of_llama_cpp(llama_cpp(tmp_path / "model.gguf"), ids))
    parity("format", f"GGUF, {case.partition('-')[0]}", "out", found)
    assert found < 3e-3  # llama.cpp looks GELU up in a table of float16 (Gemma's, GPT-2's)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize("sliding", [(0, 0, 1, 0), (1, 0, 1, 1)])
def test_llama_cpp_gives_the_layers_their_windows(kind, sliding, tmp_path, llama_cpp):
    layer_types = ["sliding_attention" if slides else "full_attention" for slides in sliding]
    fields = SIZES | dict(model_type=kind, head_dim=20, query_pre_attn_scalar=20, sliding_window=6)
    model = models.build(fields | dict(layer_types=layer_types))
    params = jax.jit(model.random_params)(jax.random.key(0))
    hub.save_gguf(tmp_path / "model.gguf", model, params, dtype="f32")
    ids = tokens()
    found = logits_of_llama_cpp(llama_cpp(tmp_path / "model.gguf"), ids)
    assert difference(model(params, jnp.asarray(ids)), found) < 1e-3
    usual = models.build(fields)
    assert difference(usual(params, jnp.asarray(ids)), found) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("kind", WINDOWED)
def test_llama_cpp_computes_no_window_beyond_its_length(kind, tmp_path, llama_cpp):
    model = models.build(SIZES | dict(model_type=kind, sliding_window=9) | WINDOWED[kind])
    params = jax.jit(model.random_params)(jax.random.key(0))
    with pytest.warns(UserWarning, match="has no window"):
        hub.save_gguf(tmp_path / "model.gguf", model, params, dtype="f32")
    ids = tokens()
    expected = np.asarray(model(params, jnp.asarray(ids)))
    found = logits_of_llama_cpp(llama_cpp(tmp_path / "model.gguf"), ids)
    assert difference(expected[:, :9], found[:, :9]) < 1e-3
    assert difference(expected[:, 10:], found[:, 10:]) > 1e-2


@pytest.mark.slow
def test_llama_cpp_adds_nothing_of_an_adapter_that_is_switched_off(tmp_path, llama_cpp):
    model, params = with_adapter("llama-wide-heads", tmp_path)
    hub.save_gguf_adapter(tmp_path / "off.gguf", model, lora.scaled(params, 0))
    ids = tokens()
    found = logits_of_llama_cpp(llama_cpp(tmp_path / "base.gguf", tmp_path / "off.gguf"), ids)
    assert difference(model(lora.strip(params), jnp.asarray(ids)), found) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("case", ADAPTERS)
def test_llama_cpp_lays_an_adapter_over_the_base(case, tmp_path, llama_cpp):
    model, params = with_adapter(case, tmp_path)
    ids = tokens()
    opened = llama_cpp(tmp_path / "base.gguf", tmp_path / "adapter.gguf")
    expected = model(params, jnp.asarray(ids))
    assert difference(expected, logits_of_llama_cpp(opened, ids)) < 1e-3
    assert difference(model(lora.strip(params), jnp.asarray(ids)), expected) > 1e-2
