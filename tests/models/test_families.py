"""Every family against transformers and PEFT, from random weights: the same logits, gradients and files."""

import copy
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import jlora
from jlora import models, tree
from jlora.families import FAMILIES
from jlora.families.fields import HARMLESS, Fields
from jlora.losses import cross_entropy
from jlora.types import BRANCH

LENGTH = 21
WIDTH = 19  # of rows with padding or several texts
# Sizes that nothing divides evenly.
SIZES = dict(
    vocab_size=101,
    hidden_size=48,
    intermediate_size=72,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, rope_theta=1e4)
LLAMA3 = dict(
    rope_type="llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
    rope_theta=5e5,
)
VISION = dict(
    hidden_size=20, intermediate_size=28, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
)
GROWING = YARN | dict(original_max_position_embeddings=5, mscale=1.0, mscale_all_dim=0.8, llama_4_scaling_beta=0.4)
GPT_SIZES = dict(vocab_size=101, n_embd=48, n_layer=3, n_head=3, n_positions=64)
NEOX_SIZES = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
MOE = SIZES | dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=20, head_dim=12)
HYBRID = SIZES | dict(
    head_dim=20,
    linear_num_key_heads=2,
    linear_num_value_heads=6,
    linear_key_head_dim=10,
    linear_value_head_dim=14,
    rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.3),
)
MAMBA = dict(mamba_n_heads=6, mamba_d_head=16, mamba_n_groups=2, mamba_d_state=10, mamba_chunk_size=8)
NEMOTRON = {name: value for name, value in SIZES.items() if name != "num_hidden_layers"}
NEMOTRON |= dict(head_dim=10, mamba_num_heads=6, mamba_head_dim=14, n_groups=2, ssm_state_size=10)
SHARED = MOE | dict(shared_expert_intermediate_size=28)
QWEN_VISION = dict(depth=1, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=4, out_hidden_size=48)
QWEN_VISION |= dict(num_position_embeddings=16)
GEMMA4 = SIZES | dict(num_hidden_layers=6, head_dim=12, global_head_dim=20, sliding_window=6, pad_token_id=0)
GEMMA4 |= dict(layer_types=["sliding_attention", "full_attention"] * 3, hidden_size_per_layer_input=10)
GEMMA4 |= dict(vocab_size_per_layer_input=101, final_logit_softcapping=3.0)
UNIFIED = {name: value for name, value in GEMMA4.items() if "per_layer" not in name}
GEMMA4_VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, head_dim=8)
GEMMA4_VISION |= dict(num_key_value_heads=2, position_embedding_size=8, patch_size=4)
GEMMA4_AUDIO = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, output_proj_dims=24)
GEMMA4_AUDIO |= dict(subsampling_conv_channels=[4, 2])
LATENT = SIZES | dict(
    num_key_value_heads=6,
    kv_lora_rank=18,
    q_lora_rank=22,
    qk_nope_head_dim=10,
    qk_rope_head_dim=6,
    v_head_dim=12,
    moe_intermediate_size=20,
    num_experts_per_tok=3,
)
YARN_LATENT = YARN | dict(mscale=1.0, mscale_all_dim=0.7)
MUSE = SIZES | dict(num_hidden_layers=5, head_dim=10, sliding_window=6, pad_token_id=0, final_logit_softcapping=3.0)
MUSE |= dict(rope_parameters=dict(rope_type="default", rope_theta=1e4))
MUSE_VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, patch_size=4)
MUSE_VISION |= dict(pos_emb_height=4, pos_emb_width=4)
MUSE_SIZES = dict(out_hidden_size=64, projector_hidden_size=20)
LONGROPE = dict(
    rope_type="longrope",
    rope_theta=1e4,
    short_factor=[1.0, 1.1],
    long_factor=[1.5, 3.0],
    original_max_position_embeddings=16,
    partial_rotary_factor=0.5,
)

# (transformers' config class, its fields)
CASES = {
    "llama": ("LlamaConfig", SIZES | dict(tie_word_embeddings=True)),
    "llama-biases": (
        "LlamaConfig",
        SIZES
        | dict(num_attention_heads=3, num_key_value_heads=3, head_dim=20, attention_bias=True, mlp_bias=True)
        | dict(rope_parameters=dict(rope_type="linear", rope_theta=1e5, factor=2.0)),
    ),
    "internlm3": ("InternLM3Config", SIZES | dict(head_dim=20, attention_bias=True, mlp_bias=True)),
    "iquestcoder": ("IQuestCoderConfig", SIZES | dict(head_dim=10)),
    "llama-3": (
        "LlamaConfig",
        SIZES | dict(rope_parameters=LLAMA3),
    ),
    "llama-yarn": ("LlamaConfig", SIZES | dict(head_dim=20, rope_parameters=YARN)),
    "llama-yarn-mscale": (
        "LlamaConfig",
        SIZES | dict(rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=0.8, truncate=False, beta_fast=16.0)),
    ),
    "llama-dynamic": (
        "LlamaConfig",
        SIZES | dict(max_position_embeddings=16, rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)),
    ),
    "mistral": ("MistralConfig", SIZES | dict(head_dim=10, sliding_window=5)),
    "mistral-full": ("MistralConfig", SIZES | dict(sliding_window=None)),
    "ministral3": ("Ministral3Config", SIZES | dict(head_dim=10, rope_parameters=GROWING)),
    "ministral3-window": (
        "Ministral3Config",
        SIZES
        | dict(head_dim=20, sliding_window=7, tie_word_embeddings=True, rope_parameters=GROWING | dict(mscale=0.7)),
    ),
    "mistral3": (
        "Mistral3Config",
        dict(
            text_config=SIZES | dict(model_type="ministral3", head_dim=10, rope_parameters=GROWING),
            vision_config=VISION | dict(model_type="pixtral", head_dim=10),
            tie_word_embeddings=False,
        ),
    ),
    "mistral3-mistral": (
        "Mistral3Config",
        dict(
            text_config=SIZES | dict(model_type="mistral", head_dim=20, sliding_window=None),
            vision_config=VISION | dict(model_type="pixtral", head_dim=10),
        ),
    ),
    "mistral3-mistral4": (
        "Mistral3Config",
        dict(
            text_config=LATENT | dict(model_type="mistral4", n_routed_experts=5, rope_parameters=GROWING),
            vision_config=VISION | dict(model_type="pixtral", head_dim=10),
            tie_word_embeddings=False,
        ),
    ),
    "mixtral": ("MixtralConfig", SIZES | dict(num_local_experts=5, num_experts_per_tok=2)),
    "mixtral-window": ("MixtralConfig", SIZES | dict(num_local_experts=3, num_experts_per_tok=3, sliding_window=6)),
    "qwen2": ("Qwen2Config", SIZES | dict(tie_word_embeddings=True)),
    "qwen2-window": ("Qwen2Config", SIZES | dict(use_sliding_window=True, sliding_window=6, max_window_layers=2)),
    "qwen3": ("Qwen3Config", SIZES | dict(head_dim=20)),
    "qwen3-bias": ("Qwen3Config", SIZES | dict(head_dim=8, attention_bias=True, tie_word_embeddings=True)),
    "qwen3_moe": ("Qwen3MoeConfig", MOE | dict(norm_topk_prob=True)),
    "qwen3_moe-sparse-step": ("Qwen3MoeConfig", MOE | dict(decoder_sparse_step=2)),
    "qwen3_moe-dense-first": ("Qwen3MoeConfig", MOE | dict(mlp_only_layers=[0])),
    "qwen3_next": ("Qwen3NextConfig", SHARED | HYBRID),
    "qwen3_next-dense-first": (
        "Qwen3NextConfig",
        SHARED
        | HYBRID
        | dict(num_hidden_layers=5, mlp_only_layers=[0], norm_topk_prob=False, attention_bias=True)
        | dict(layer_types=["full_attention"] + ["linear_attention", "full_attention"] * 2, linear_conv_kernel_dim=3),
    ),
    "qwen3_5_text": ("Qwen3_5TextConfig", HYBRID),
    "qwen3_5_text-period": (
        "Qwen3_5TextConfig",
        HYBRID
        | dict(num_hidden_layers=7, full_attention_interval=3, tie_word_embeddings=True, linear_num_value_heads=2)
        | dict(
            rope_parameters=dict(
                rope_type="default", rope_theta=1e6, mrope_section=[2, 2, 1], partial_rotary_factor=0.5
            )
        ),
    ),
    "qwen3_5_moe_text": ("Qwen3_5MoeTextConfig", SHARED | HYBRID),
    "qwen3_5": ("Qwen3_5Config", dict(text_config=HYBRID, vision_config=QWEN_VISION)),
    "qwen3_5_moe": ("Qwen3_5MoeConfig", dict(text_config=SHARED | HYBRID, vision_config=QWEN_VISION)),
    "lfm2": ("Lfm2Config", SIZES | dict(layer_types=["conv", "conv", "full_attention", "conv"], block_multiple_of=20)),
    "lfm2-biases": (
        "Lfm2Config",
        SIZES
        | dict(num_hidden_layers=5, conv_bias=True, conv_L_cache=4, block_auto_adjust_ff_dim=False)
        | dict(full_attn_idxs=[1, 3], tie_word_embeddings=False),
    ),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        SIZES
        | dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=20, num_dense_layers=1)
        | dict(num_hidden_layers=3, layer_types=["conv", "conv", "full_attention"], routed_scaling_factor=1.3),
    ),
    "lfm2_moe-plain": (
        "Lfm2MoeConfig",
        SIZES
        | dict(num_experts=3, num_experts_per_tok=3, moe_intermediate_size=20, num_dense_layers=0, conv_bias=True)
        | dict(use_expert_bias=False, norm_topk_prob=False, tie_word_embeddings=False)
        | dict(layer_types=["full_attention", "conv"] * 2),
    ),
    "olmoe": (
        "OlmoeConfig",
        SIZES
        | dict(num_experts=5, num_experts_per_tok=2, norm_topk_prob=True, attention_bias=True, intermediate_size=20),
    ),
    "flex_olmo": (
        "FlexOlmoConfig",
        SIZES | dict(num_experts=5, num_experts_per_tok=3, pad_token_id=0, intermediate_size=20),
    ),
    "qwen2_moe": ("Qwen2MoeConfig", SHARED | dict(num_hidden_layers=3)),
    "qwen2_moe-window": (
        "Qwen2MoeConfig",
        SHARED
        | dict(use_sliding_window=True, sliding_window=6, max_window_layers=3, qkv_bias=False, norm_topk_prob=True)
        | dict(decoder_sparse_step=2, tie_word_embeddings=True),
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        SIZES | dict(moe_num_experts=5, moe_k=2, moe_intermediate_size=20, moe_num_shared_experts=1, head_dim=10),
    ),
    "ernie4_5_moe-layers": (
        "Ernie4_5_MoeConfig",
        SIZES
        | dict(moe_num_experts=3, moe_k=2, moe_intermediate_size=20, moe_num_shared_experts=0)
        | dict(num_hidden_layers=6, moe_layer_interval=2, moe_layer_end_index=4, tie_word_embeddings=False),
    ),
    "hunyuan_v1_moe": (
        "HunYuanMoEV1Config",
        SIZES
        | dict(num_experts=5, moe_topk=[2] * 4, head_dim=10, intermediate_size=20, pad_token_id=0, attention_bias=True),
    ),
    "cohere": ("CohereConfig", SIZES | dict(num_hidden_layers=2, logit_scale=0.3, attention_bias=True)),
    "cohere2": ("Cohere2Config", SIZES | dict(num_hidden_layers=5, sliding_window=6, tie_word_embeddings=False)),
    "muse_glimmer": ("MuseGlimmerConfig", dict(text_config=MUSE, vision_config=MUSE_VISION, **MUSE_SIZES)),
    "muse_glimmer-layers": (
        "MuseGlimmerConfig",
        dict(
            text_config=MUSE
            | dict(num_hidden_layers=4, attention_bias=True, qk_scale_factor=1.3, output_multiplier=0.7)
            | dict(layer_types=["full_attention", "sliding_attention"] * 2, layer_rope_theta=[1e4, 0, 0, 1e4])
            | dict(post_norm_eps=0.1),
            vision_config=MUSE_VISION,
            **MUSE_SIZES,
        ),
    ),
    "gemma": ("GemmaConfig", SIZES | dict(head_dim=20)),
    "gemma2": (
        "Gemma2Config",
        SIZES
        | dict(head_dim=10, sliding_window=6, query_pre_attn_scalar=12, attn_logit_softcapping=2.0)
        | dict(final_logit_softcapping=3.0),
    ),
    "gemma2-odd": (
        "Gemma2Config",
        SIZES | dict(num_hidden_layers=3, head_dim=10, sliding_window=6, final_logit_softcapping=None),
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        SIZES | dict(num_hidden_layers=7, head_dim=12, sliding_window=6, query_pre_attn_scalar=10),
    ),
    "gemma3_text-linear": (
        "Gemma3TextConfig",
        SIZES
        | dict(head_dim=12, sliding_window=6, layer_types=["sliding_attention", "full_attention"] * 2)
        | dict(rope_scaling=dict(rope_type="linear", factor=8.0)),
    ),
    "gemma3": (
        "Gemma3Config",
        dict(
            text_config=SIZES | dict(num_hidden_layers=7, head_dim=12, sliding_window=6, query_pre_attn_scalar=10),
            vision_config=VISION,
            mm_tokens_per_image=4,
        ),
    ),
    "gemma3-untied": (
        "Gemma3Config",
        dict(
            text_config=SIZES | dict(num_hidden_layers=2, head_dim=12, sliding_window=6, attention_bias=True),
            vision_config=VISION,
            tie_word_embeddings=False,
        ),
    ),
    "gemma4_text": (
        "Gemma4TextConfig",
        SIZES
        | dict(num_hidden_layers=6, head_dim=12, global_head_dim=20, sliding_window=6, pad_token_id=0)
        | dict(layer_types=["sliding_attention"] * 2 + ["full_attention"] * 2 + ["sliding_attention"] * 2)
        | dict(hidden_size_per_layer_input=10, vocab_size_per_layer_input=101, num_kv_shared_layers=3)
        | dict(use_double_wide_mlp=True, final_logit_softcapping=3.0),
    ),
    "gemma4_text-experts": (
        "Gemma4TextConfig",
        SIZES
        | dict(num_hidden_layers=4, head_dim=12, global_head_dim=20, sliding_window=6, pad_token_id=0)
        | dict(layer_types=["sliding_attention", "full_attention"] * 2, hidden_size_per_layer_input=0)
        | dict(enable_moe_block=True, num_experts=5, top_k_experts=2, moe_intermediate_size=20),
    ),
    "gemma4_text-same": (
        "Gemma4TextConfig",
        SIZES
        | dict(num_hidden_layers=4, head_dim=12, global_head_dim=16, num_global_key_value_heads=1, sliding_window=6)
        | dict(layer_types=["sliding_attention", "full_attention"] * 2, attention_k_eq_v=True, attention_bias=True)
        | dict(hidden_size_per_layer_input=0, pad_token_id=0, tie_word_embeddings=False)
        | dict(
            rope_parameters=dict(
                full_attention=dict(rope_type="proportional", partial_rotary_factor=0.4, rope_theta=1e5),
                sliding_attention=dict(rope_type="default", rope_theta=1e3),
            )
        ),
    ),
    "gemma4": (
        "Gemma4Config",
        dict(
            text_config=GEMMA4 | dict(num_kv_shared_layers=2),
            vision_config=GEMMA4_VISION,
            audio_config=GEMMA4_AUDIO,
        ),
    ),
    "gemma4_unified_text": ("Gemma4UnifiedTextConfig", UNIFIED | dict(num_kv_shared_layers=2)),
    "gemma4_unified": (
        "Gemma4UnifiedConfig",
        dict(
            text_config=UNIFIED | dict(attention_k_eq_v=True, num_global_key_value_heads=1),
            vision_config=dict(patch_size=2, pooling_kernel_size=2, mm_embed_dim=20, mm_posemb_size=6),
            audio_config=dict(audio_embed_dim=18),
        ),
    ),
    "phi3": ("Phi3Config", SIZES | dict(pad_token_id=0, partial_rotary_factor=0.5, sliding_window=9)),
    "phi3-longrope": (
        "Phi3Config",
        SIZES | dict(pad_token_id=0, original_max_position_embeddings=16, rope_parameters=LONGROPE),
    ),
    "smollm3": ("SmolLM3Config", SIZES | dict(pad_token_id=0)),
    "smollm3-window": (
        "SmolLM3Config",
        SIZES
        | dict(num_hidden_layers=5, pad_token_id=0, use_sliding_window=True, sliding_window=6, no_rope_layer_interval=2)
        | dict(mlp_bias=True, attention_bias=True, tie_word_embeddings=False),
    ),
    "olmo2": ("Olmo2Config", SIZES),
    "olmo3": (
        "Olmo3Config",
        SIZES
        | dict(num_hidden_layers=5, sliding_window=6)
        | dict(rope_parameters=dict(full_attention=YARN, sliding_attention=dict(rope_type="default", rope_theta=1e4))),
    ),
    "olmo3-two-bases": (
        "Olmo3Config",
        SIZES
        | dict(sliding_window=6, layer_types=["full_attention", "sliding_attention"] * 2, attention_bias=True)
        | dict(rope_parameters=dict(sliding_attention=dict(rope_type="default", rope_theta=1e3))),
    ),
    "granite": (
        "GraniteConfig",
        SIZES
        | dict(embedding_multiplier=12.0, logits_scaling=8.0, residual_multiplier=0.22, attention_multiplier=0.2)
        | dict(attention_bias=True),
    ),
    "granitemoe": (
        "GraniteMoeConfig",
        SIZES
        | dict(embedding_multiplier=12.0, logits_scaling=6.0, residual_multiplier=0.22, attention_multiplier=0.2)
        | dict(num_local_experts=5, num_experts_per_tok=3, tie_word_embeddings=True),
    ),
    "granitemoe-biases": (
        "GraniteMoeConfig",
        SIZES | dict(num_local_experts=3, num_experts_per_tok=2, attention_bias=True, rope_parameters=YARN),
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        SIZES
        | MAMBA
        | dict(embedding_multiplier=12.0, logits_scaling=6.0, residual_multiplier=0.22, attention_multiplier=0.2)
        | dict(shared_intermediate_size=28, num_local_experts=5, num_experts_per_tok=3, num_hidden_layers=3)
        | dict(layer_types=["mamba", "mamba", "attention"]),
    ),
    "granitemoehybrid-dense": (
        "GraniteMoeHybridConfig",
        SIZES
        | MAMBA
        | dict(shared_intermediate_size=40, num_local_experts=0, position_embedding_type="rope", mamba_n_groups=1)
        | dict(layer_types=["mamba", "attention"] * 2, time_step_limit=(0.2, 0.9), mamba_conv_bias=False)
        | dict(mamba_proj_bias=True, tie_word_embeddings=True, attention_bias=True, mamba_d_conv=3),
    ),
    "bamba": (
        "BambaConfig",
        SIZES | MAMBA | dict(head_dim=12, num_hidden_layers=3, attn_layer_indices=[1]),
    ),
    "bamba-biases": (
        "BambaConfig",
        SIZES
        | MAMBA
        | dict(num_hidden_layers=2, attn_layer_indices=[0], attention_bias=True, mlp_bias=True, mamba_proj_bias=True)
        | dict(rope_parameters=dict(rope_type="default", rope_theta=1e5, partial_rotary_factor=1.0)),
    ),
    "falcon_h1": (
        "FalconH1Config",
        SIZES
        | MAMBA
        | dict(num_hidden_layers=2, mamba_d_ssm=72, mamba_d_head=12, key_multiplier=0.6, embedding_multiplier=3.0)
        | dict(lm_head_multiplier=0.3, mlp_multipliers=[0.7, 1.4], ssm_multipliers=[0.8, 1.2, 0.9, 1.3, 0.7])
        | dict(ssm_in_multiplier=1.1, ssm_out_multiplier=0.6, attention_in_multiplier=0.9)
        | dict(attention_out_multiplier=1.3),
    ),
    "falcon_h1-norm": (
        "FalconH1Config",
        SIZES
        | MAMBA
        | dict(num_hidden_layers=2, head_dim=10, mamba_d_ssm=None, mamba_rms_norm=True, projectors_bias=True)
        | dict(attention_bias=True, mlp_bias=True, attention_in_multiplier=0.9, tie_word_embeddings=True),
    ),
    "falcon_h1-gated": (
        "FalconH1Config",
        SIZES | MAMBA | dict(num_hidden_layers=2, mamba_d_ssm=96, mamba_rms_norm=True, mamba_norm_before_gate=False),
    ),
    "nemotron_h": (
        "NemotronHConfig",
        NEMOTRON | dict(layers_block_type=["mamba", "mlp", "attention", "mamba"], time_step_min=0.3),
    ),
    "nemotron_h-experts": (
        "NemotronHConfig",
        NEMOTRON
        | dict(layers_block_type=["moe", "mamba", "moe", "attention"], use_bias=True, conv_kernel=3, mlp_bias=True)
        | dict(n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3, moe_intermediate_size=20)
        | dict(moe_shared_expert_intermediate_size=28, moe_latent_size=28, routed_scaling_factor=1.7, n_groups=1),
    ),
    "apertus": ("ApertusConfig", SIZES | dict(tie_word_embeddings=True)),
    "apertus-relu": (
        "ApertusConfig",
        SIZES | dict(hidden_act="relu2", attention_bias=True, rope_parameters=YARN, head_dim=10),
    ),
    "arcee": ("ArceeConfig", SIZES | dict(head_dim=10)),
    "arcee-biases": ("ArceeConfig", SIZES | dict(attention_bias=True, mlp_bias=True, rope_parameters=YARN)),
    "seed_oss": ("SeedOssConfig", SIZES | dict(head_dim=20)),
    "seed_oss-biases": (
        "SeedOssConfig",
        SIZES | dict(head_dim=8, attention_bias=False, attention_out_bias=True, mlp_bias=True),
    ),
    "exaone4": ("Exaone4Config", SIZES | dict(num_hidden_layers=5, sliding_window=6)),
    "exaone4-full": (
        "Exaone4Config",
        SIZES
        | dict(sliding_window=None, layer_types=["full_attention"] * 4, tie_word_embeddings=True)
        | dict(rope_parameters=LLAMA3),
    ),
    "hunyuan_v1_dense": (
        "HunYuanDenseV1Config",
        SIZES | dict(head_dim=10, rope_parameters=dict(rope_type="dynamic", alpha=50.0, factor=1.0, rope_theta=1e4)),
    ),
    "hunyuan_v1_dense-bias": (
        "HunYuanDenseV1Config",
        SIZES | dict(head_dim=8, attention_bias=True, tie_word_embeddings=True),
    ),
    "ernie4_5": ("Ernie4_5Config", SIZES | dict(head_dim=10)),
    "ernie4_5-biases": (
        "Ernie4_5Config",
        SIZES | dict(head_dim=8, use_bias=True, tie_word_embeddings=False, rope_parameters=YARN),
    ),
    "nanochat": ("NanoChatConfig", SIZES),
    "nanochat-bias": ("NanoChatConfig", SIZES | dict(attention_bias=True, final_logit_softcapping=None)),
    "glm": ("GlmConfig", SIZES | dict(head_dim=12, pad_token_id=0)),
    "glm-whole": (
        "GlmConfig",
        SIZES
        | dict(head_dim=10, pad_token_id=0, attention_bias=False)
        | dict(rope_parameters=dict(rope_type="default", rope_theta=1e5, partial_rotary_factor=1.0)),
    ),
    "glm4": ("Glm4Config", SIZES | dict(head_dim=12, pad_token_id=0, tie_word_embeddings=True)),
    "helium": ("HeliumConfig", SIZES | dict(head_dim=8)),
    "helium-biases": ("HeliumConfig", SIZES | dict(head_dim=8, attention_bias=True, mlp_bias=True)),
    "starcoder2": ("Starcoder2Config", SIZES | dict(sliding_window=6)),
    "starcoder2-plain": ("Starcoder2Config", SIZES | dict(use_bias=False, tie_word_embeddings=False)),
    "deepseek_v3": (
        "DeepseekV3Config",
        LATENT
        | dict(n_routed_experts=8, n_group=4, topk_group=2, first_k_dense_replace=2, rope_parameters=YARN_LATENT),
    ),
    "deepseek_v3-plain": (
        "DeepseekV3Config",
        LATENT
        | dict(n_routed_experts=5, n_group=1, topk_group=1, first_k_dense_replace=0, q_lora_rank=None)
        | dict(attention_bias=True, rope_interleave=False, v_head_dim=20, norm_topk_prob=False),
    ),
    "glm4_moe_lite": ("Glm4MoeLiteConfig", LATENT | dict(n_routed_experts=5, v_head_dim=14, n_shared_experts=2)),
    "mistral4": (
        "Mistral4Config",
        LATENT
        | dict(n_routed_experts=8, n_group=4, topk_group=2, first_k_dense_replace=1, routed_scaling_factor=1.7)
        | dict(rope_parameters=YARN_LATENT | dict(llama_4_scaling_beta=0.4, original_max_position_embeddings=5)),
    ),
    "mistral4-plain": (
        "Mistral4Config",
        LATENT
        | dict(n_routed_experts=5, q_lora_rank=None, attention_bias=True, rope_interleave=False, norm_topk_prob=False)
        | dict(v_head_dim=20, tie_word_embeddings=True, rope_parameters=GROWING),
    ),
    "gpt2": ("GPT2Config", GPT_SIZES),
    "gpt2-scaled": (
        "GPT2Config",
        GPT_SIZES | dict(n_inner=50, scale_attn_by_inverse_layer_idx=True, activation_function="relu"),
    ),
    "gpt_oss": (
        "GptOssConfig",
        SIZES
        | dict(num_local_experts=5, num_experts_per_tok=2, head_dim=10, sliding_window=6, swiglu_limit=1.5)
        | dict(rope_parameters=YARN | dict(truncate=False)),
    ),
    "gpt_oss-odd": (
        "GptOssConfig",
        SIZES
        | dict(num_hidden_layers=3, num_local_experts=3, num_experts_per_tok=3, head_dim=12, sliding_window=5)
        | dict(swiglu_alpha=1.2, attention_bias=False, tie_word_embeddings=True)
        | dict(layer_types=["full_attention", "sliding_attention", "full_attention"]),
    ),
    "gpt_neox": ("GPTNeoXConfig", NEOX_SIZES | dict(rotary_pct=0.5)),
    "gpt_neox-serial": (
        "GPTNeoXConfig",
        NEOX_SIZES | dict(use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True, rotary_pct=1.0),
    ),
}


# Cases whose layers are those of others: their weights have other names and their settings other values, which
# `test_logits` sees.
ALIKE = (
    *("arcee", "ernie4_5", "gemma", "glm4", "granite", "helium", "internlm3", "iquestcoder", "mistral3", "olmo2"),
    *("qwen2", "seed_oss", "cohere", "gemma3"),
    *("ernie4_5_moe", "flex_olmo", "granitemoe", "hunyuan_v1_moe", "olmoe", "qwen2_moe", "glm4_moe_lite", "lfm2_moe"),
    *("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5", "bamba", "gemma4", "gemma4_unified", "gemma4_unified_text"),
)


def each(cases, slow):
    return [pytest.param(case, marks=pytest.mark.slow) if case in slow else case for case in cases]


SECOND = [case for case in CASES if "-" in case]
FIRST_CASES = each(CASES, SECOND)  # of each family
DISTINCT_CASES = each(CASES, {*SECOND, *ALIKE})


def auto_class(config):
    """transformers' class for models of this kind with a head for logits."""
    text = transformers.AutoModelForCausalLM
    sees = FAMILIES[config.model_type].half or type(config) not in text._model_mapping  # Mistral 4 is only part of one
    return transformers.AutoModelForImageTextToText if sees else text


def opened(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    return auto_class(config).from_pretrained(folder, attn_implementation="eager").eval()


def configured(case):
    """transformers' config of the case, of fields of its own: transformers writes into nested ones."""
    name, fields = CASES[case]
    return getattr(transformers, name)(**copy.deepcopy(fields), attn_implementation="eager")


@functools.cache
def reference(case):
    """transformers' model, `randomised`."""
    config = configured(case)
    return randomised(auto_class(config).from_config(config, attn_implementation="eager"))


def randomised(model):
    """The model with random weights everywhere, norms and biases too."""
    torch.manual_seed(0)
    with torch.no_grad():
        for key, value in model.named_parameters():
            center = 1.0 if "norm" in key or "ln_" in key else 0.0
            value.copy_(center + 0.3 * torch.randn_like(value))
        for key, value in model.named_buffers():
            if key.endswith("layer_scalar"):
                value.copy_(1 + 0.3 * torch.randn_like(value))
            if key.endswith("act_fn.beta"):
                value.copy_(0.5 + 0.1 * torch.randn_like(value))
            if key.endswith(("e_score_correction_bias", "expert_bias")):
                value.copy_(0.3 * torch.randn_like(value))
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """case → the folder that transformers saved the model in."""

    @functools.cache
    def save(case):
        folder = tmp_path_factory.mktemp(case)
        reference(case).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="module")
def load(folders):
    return functools.cache(lambda case: jlora.load(folders(case)))


def tokens(rows=2, length=LENGTH, seed=1):
    return np.random.default_rng(seed).integers(1, 101, (rows, length))


def logits_of(model, ids, **inputs):
    with torch.no_grad():
        return model(torch.from_numpy(ids), use_cache=False, **inputs).logits.numpy()


def difference(ours, theirs):
    """The largest difference, relative to the largest value."""
    return float(np.max(np.abs(np.asarray(ours) - theirs)) / np.max(np.abs(theirs)))


@pytest.mark.parametrize("case", CASES)
def test_logits(case, load, parity):
    model, params = load(case)
    ids = tokens()
    found = difference(model(params, jnp.asarray(ids)), logits_of(reference(case), ids))
    parity("family", case.partition("-")[0], "logits", found)
    assert found < 1e-4


@pytest.mark.parametrize("case", DISTINCT_CASES)
def test_cache_token_by_token(case, load, parity):
    model, params = load(case)
    ids = tokens(length=13)
    step = jax.jit(lambda params, ids, positions, cache: model.hidden(params, ids, positions, cache=cache))
    cache, parts = model.empty_cache(params, batch=2, size=17), []
    for i in range(13):
        hidden, cache = step(params, jnp.asarray(ids[:, i : i + 1]), jnp.full((2, 1), i), cache)
        parts.append(hidden)
    hidden = jnp.asarray(np.concatenate(parts, axis=1))
    found = difference(model.logits(params, hidden), logits_of(reference(case), ids))
    parity("family", case.partition("-")[0], "cache", found)
    assert found < 1e-4


def laid_out(model, params, *rows):
    """The logits of rows of texts, each a list of texts and of numbers of places of padding.

    All calls have one shape, so that a case is compiled once.
    """
    ids, positions, segments = np.zeros((3, 2, WIDTH), np.int32)
    for row, texts in enumerate(rows):
        place = 0
        for number, text in enumerate(texts, start=1):
            if isinstance(text, int):
                place += text
                continue
            end = place + len(text)
            ids[row, place:end], positions[row, place:end], segments[row, place:end] = text, range(len(text)), number
            place = end
    return np.asarray(model(params, *map(jnp.asarray, (ids, positions, segments))))


@pytest.mark.parametrize("case", DISTINCT_CASES)
def test_padding(case, load, parity):
    """A row of its own, with padding on either side, and transformers with the same padding."""
    model, params = load(case)
    ids = tokens(rows=1, length=11)
    pad = WIDTH - 11
    expected = logits_of(reference(case), ids)
    left, right = laid_out(model, params, [pad, ids[0]], [ids[0]])
    mask = np.pad(np.ones_like(ids), ((0, 0), (pad, 0)))
    inputs = {"attention_mask": mask, "position_ids": np.maximum(np.cumsum(mask, axis=1) - 1, 0)}
    padded = np.pad(ids, ((0, 0), (pad, 0)))
    theirs = logits_of(reference(case), padded, **{name: torch.from_numpy(x) for name, x in inputs.items()})[:, pad:]
    # In transformers, padding enters convolutions through the biases of the linears before them.
    mamba = model.config.mamba
    others = (expected,) if model.config.conv_bias or (mamba and mamba.bias) else (expected, theirs)
    found = max(difference(ours, other[0]) for ours in (left[pad:], right[:11]) for other in others)
    parity("family", case.partition("-")[0], "padding", found)
    assert found < 1e-4


@pytest.mark.parametrize("case", DISTINCT_CASES)
def test_packing(case, load, parity):
    model, params = load(case)
    first, second, other = (tokens(rows=1, length=n, seed=n)[0] for n in (8, 10, 7))
    packed, _ = laid_out(model, params, [first, second], [second])
    found = max(
        difference(packed[:8], logits_of(reference(case), first[None])[0]),
        difference(packed[8:18], logits_of(reference(case), second[None])[0]),
    )
    parity("family", case.partition("-")[0], "packing", found)
    assert found < 1e-4
    changed, _ = laid_out(model, params, [np.concatenate([first[:1], other]), second], [second])
    np.testing.assert_array_equal(changed[8:18], packed[8:18])
    assert not np.array_equal(changed[:8], packed[:8])


# What these add to a layer has a gradient in other cases: latents, growing queries and the delta net; windows and
# layers without rotation (Cohere 2), norms after a sublayer (OLMo 3) and of rotated queries (nanochat), two linears in
# one (Phi 3), experts (Qwen 3).
SAME_GRADIENTS = ("mistral4", "ministral3", "qwen3_5_text", "mistral", "smollm3", "exaone4", "hunyuan_v1_dense", "glm")
SAME_GRADIENTS += ("mixtral",)
# Here one rounding of the weights (by 1e-7) moves transformers' own gradients by 6e-4.
ROUGH = ("qwen3_next-dense-first",)


@pytest.mark.parametrize("case", each(CASES, {*SECOND, *ALIKE, *SAME_GRADIENTS}))
def test_lora_gradients(case, folders, load, parity, tmp_path):
    """The gradients of a LoRA step on all linears, and the export's tensors, are PEFT's."""
    model, params = load(case)
    torch.manual_seed(2)
    base = opened(folders(case))
    # Of mixtures PEFT takes "all-linear" to mean the experts' fused parameters as well.
    half = FAMILIES[base.config.model_type].half
    whole = [name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)]
    linears = {name.split(".")[-1] for name in whole if half is None or f".{half.module}." in name}
    # Of most mixtures PEFT takes names of the MLP's linears to mean the experts.
    mlp = set() if "qwen3_5_moe" in case else {"gate_proj", "up_proj", "down_proj"}
    mlp |= {"wg"}  # Hunyuan's router, which is a linear in transformers alone
    refused = set(FAMILIES[base.config.model_type].refused)
    chosen = linears - {"lm_head"} - refused - (mlp if model.config.experts else set())
    targets = sorted(chosen) if model.config.experts or refused else "all-linear"
    if half:  # and of models that see, the tower's linears
        targets = rf".*\.{half.module}\..*\.({'|'.join(chosen)})"
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False, fan_in_fan_out="gpt2" in case
    )
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path / "peft")
    ids = tokens(seed=3)
    loss = theirs(torch.from_numpy(ids), labels=torch.from_numpy(ids), use_cache=False).loss
    loss.backward()
    expected = {
        name.replace(".default", ""): value.grad.numpy()
        for name, value in theirs.named_parameters()
        if value.requires_grad
    }

    params = jlora.load_adapter(params, tmp_path / "peft")
    frozen, trainable = jlora.lora.split(params)
    targets, weights = np.roll(ids, -1, axis=1), np.ones(ids.shape, np.float32)
    weights[:, -1] = 0

    def mean_loss(trainable):
        whole = jlora.lora.combine(frozen, trainable)
        hidden, _ = model.hidden(whole, jnp.asarray(ids), remat=True)
        sums = cross_entropy(model.project, model.head(whole), hidden, jnp.asarray(targets), jnp.asarray(weights))
        return sums.loss / sums.weight

    ours, gradients = jax.jit(jax.value_and_grad(mean_loss))(trainable)
    np.testing.assert_allclose(float(ours), loss.item(), rtol=1e-4)
    jlora.save_adapter(tmp_path / "gradients", jlora.lora.combine(frozen, gradients))
    found = load_file(tmp_path / "gradients" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    largest = max(difference(found[name], expected[name]) for name in expected)
    parity("family", case.partition("-")[0], "LoRA gradients", largest)
    assert largest < (3e-3 if case in ROUGH else 1e-3)


def test_what_peft_does_not_adapt_is_said_where_an_adapter_is_written(folders, load, tmp_path):
    folder, config = folders("falcon_h1"), peft.LoraConfig(target_modules=["out_proj"])
    with pytest.raises(ValueError, match="'out_proj' is incompatible"):
        peft.get_peft_model(opened(folder), config)
    adapted = jlora.lora.init(load("falcon_h1")[1], jlora.LoraConfig(r=2), jax.random.key(0))
    with pytest.warns(UserWarning, match="PEFT opens no adapter of out_proj in models of the type falcon_h1"):
        jlora.save_adapter(tmp_path, adapted, base=str(folder))


@pytest.mark.parametrize("case", FIRST_CASES)
def test_export(case, load, parity, tmp_path):
    """transformers opens what jlora saves, with the same tensors and logits."""
    model, params = load(case)
    jlora.save_model(tmp_path / "out", model, params)
    written, state = opened(tmp_path / "out"), reference(case).state_dict()
    assert written.state_dict().keys() == state.keys()
    for name, value in written.state_dict().items():
        assert torch.equal(value, state[name]), name
    ids = tokens()
    found = difference(logits_of(written, ids), np.asarray(model(params, jnp.asarray(ids))))
    parity("family", case.partition("-")[0], "export", found)
    assert found < 1e-4


# The first case of each family that transformers has classifiers of; tests/hub/checkpoints/test_score.py has the rest.
COSTLY = ("qwen3_next", "qwen3_moe", "mixtral", "hunyuan_v1_moe")  # and like Qwen 3.5 and Qwen 2's mixture in this
SCORED = [
    case
    for case in CASES
    if "-" not in case
    and FAMILIES[case].score
    and case not in ("llama", "qwen2", "qwen3", "gemma3", "gpt2", "gpt_neox")
]


@pytest.mark.parametrize("case", each(SCORED, {*COSTLY, *ALIKE}))
def test_score_head(case, tmp_path):
    """A reward model of transformers gives the same scores, and is written again tensor by tensor."""
    config = configured(case)
    for one in (config, config.get_text_config()):
        one.num_labels, one.eos_token_id = 1, 6
    classifier = randomised(transformers.AutoModelForSequenceClassification.from_config(config))
    classifier.save_pretrained(tmp_path / "theirs")
    model, params = jlora.load(tmp_path / "theirs")
    ids = tokens(rows=1, length=5)
    hidden = jax.jit(lambda params, ids: model.hidden(params, ids)[0])(params, jnp.asarray(ids))
    assert difference(model.score(params, hidden[:, -1]), logits_of(classifier, ids)[:, 0]) < 1e-4
    jlora.save_model(tmp_path / "ours", model, params)
    state = classifier.state_dict()
    written = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").state_dict()
    assert written.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in written.items())


@pytest.mark.parametrize("case", FIRST_CASES)
def test_a_familys_tree_is_told_to_be_one_of_jloras_own(case):
    """By structure, which other models' trees are told by too: nothing in it is taken for a single module."""
    model = models.build(configured(case).to_dict())
    leaves = tree.flatten(model.abstract_params())
    assert tree.is_own(leaves)
    stack_of = tree.stacks_of(leaves)
    stacked = {path: stack_of(path) for path in leaves}
    assert stacked == {path: tree.stack_of(path) for path in leaves}
    assert {stack.name for stack in stacked.values() if stack} == {model.config.names.stack}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_field_of_the_config_is_known(model_type):
    """Each field of transformers' config class is read, or known to change nothing."""
    theirs = transformers.CONFIG_MAPPING[model_type]().to_dict()
    fields = Fields(theirs)
    FAMILIES[model_type].read(fields)
    fields.finish()
    FAMILIES[model_type].read(fields.replaced(layer_types=None, no_rope_layers=None, use_sliding_window=True))
    known = fields.seen | HARMLESS | {"model_type", "eos_token_id"}
    assert not {name for name, value in theirs.items() if value is not None} - known


def test_dense_and_sparse_layers_lie_in_stacks_of_their_own(load):
    stacks = {case: {path.split("/")[0] for path in tree.flatten(load(case)[1]) if "layers" in path} for case in CASES}
    assert stacks["qwen3_moe"] == {"layers"}
    assert stacks["qwen3_moe-sparse-step"] == {"layers@0-2:2", "layers@1-3:2"}
    assert stacks["qwen3_moe-dense-first"] == {"layers@0-0", "layers@1-3"}


@pytest.mark.parametrize(
    "case",
    [
        *("llama", "qwen3_next", "qwen3_5_text", "falcon_h1"),
        *(pytest.param(case, marks=pytest.mark.slow) for case in ("granitemoehybrid", "nemotron_h")),
    ],
)
def test_branches_continue_from_what_they_share(case, load):
    """A shared prompt and two answers in one row, and each pair of prompt and answer by itself."""
    model, params = load(case)
    prompt, first, second = (tokens(rows=1, length=n, seed=n)[0] for n in (8, 4, 7))
    ids = np.concatenate([prompt, first, second])
    segments = [1] * 8 + [1 + BRANCH] * 4 + [1 + 2 * BRANCH] * 7
    positions = [*range(8), *range(8, 12), *range(8, 15)]
    row = (jnp.asarray(np.array([values] * 2, np.int32)) for values in (ids, positions, segments))
    shared, _ = model(params, *row)  # of `laid_out`'s shape: by the same program
    alone = laid_out(model, params, *([np.concatenate([prompt, answer])] for answer in (first, second)))
    for texts, places in zip(alone, (slice(8, 12), slice(12, 19)), strict=True):
        answer = texts[8 : 8 + places.stop - places.start]
        assert difference(shared[places], answer) < 1e-5


@pytest.mark.parametrize(
    ("case", "kept"), [("qwen3_5_text", {"in_proj_a", "in_proj_b"}), ("qwen3_next", {"in_proj_ba"})]
)
def test_four_bits_leave_out_what_a_family_says_is_sensitive(case, kept, folders):
    _, params = jlora.hub.describe(folders(case), quant="nf4")
    leaves = tree.flatten(params)
    packed = {path.split("/")[-2] for path, leaf in leaves.items() if jlora.quant.is_packed(leaf)}
    dense = {
        path.split("/")[-2] for path, leaf in leaves.items() if not jlora.quant.is_packed(leaf) and "/kernel" in path
    }
    gates = {"shared_expert_gate"} if case == "qwen3_next" else set()
    assert dense == kept | gates | {"lm_head"} and {"out_proj", "q_proj", "o_proj"} < packed


@pytest.mark.parametrize("case", ["llama", "gemma2", "olmo3", "qwen3_moe-sparse-step"])
def test_the_compiled_program_does_not_grow_with_depth(case, folders):
    def size(depth):
        config = json.loads((folders(case) / "config.json").read_text())
        config |= {"num_hidden_layers": depth}
        config.pop("layer_types", None)
        model = models.build(config)
        params = model.abstract_params()
        ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
        return len(jax.jit(lambda params, ids: model(params, ids)).lower(params, ids).as_text())

    assert size(80) < 1.5 * size(8)


def test_letters_stand_for_layers_in_older_files(folders):
    config = json.loads((folders("nemotron_h") / "config.json").read_text())
    expected = models.build(config).config.layers
    del config["layers_block_type"]
    assert models.build(config | {"hybrid_override_pattern": "M-*M"}).config.layers == expected


def test_more_tokens_than_learned_positions_are_refused(load):
    model, params = load("gpt2")
    for call in (
        lambda: model(params, jnp.asarray(tokens(length=65))),
        lambda: model.empty_cache(params, batch=1, size=65),
    ):
        with pytest.raises(ValueError, match="65 tokens in a row, but gpt2 has learned 64 positions"):
            call()
    assert np.all(np.isfinite(model(params, jnp.asarray(tokens(length=64)))))


def test_a_checkpoint_of_the_base_model_alone(tmp_path):
    """Its names lack the head class's prefix, as those of the original GPT-2 do."""
    base = reference("gpt2").transformer
    base.save_pretrained(tmp_path)
    model, params = jlora.load(tmp_path)
    ids = tokens()
    assert difference(model(params, jnp.asarray(ids)), logits_of(reference("gpt2"), ids)) < 1e-4


def test_mixed_formats_lie_in_stacks_of_their_own(folders):
    rules = ((r"layers/(0|3)/mlp/.*", None), (r"layers/.*/kernel", "nf4"))
    model, params = jlora.load(folders("llama"), quant=jlora.QuantConfig(rules=rules))
    packed = {path for path, leaf in tree.flatten(params).items() if not isinstance(leaf, jax.Array)}
    assert "layers@0-0/self_attn/q_proj/kernel" in packed and "layers@1-2/mlp/up_proj/kernel" in packed
    assert not any(path.startswith(("layers@0-0/mlp", "layers@3-3/mlp")) for path in packed)
    dense = tree.map_with_path(
        lambda _, leaf: leaf if isinstance(leaf, jax.Array) else jlora.quant.dequantize(leaf), params
    )
    ids = jnp.asarray(tokens())
    assert difference(model(params, ids), np.asarray(model(dense, ids))) < 1e-5


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("llama", {"partial_rotary_factor": 0.5, "rope_parameters": None}),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 2]}}),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0, "mrope_section": [1]}}),
        ("gemma3_text", {"partial_rotary_factor": 0.5}),
        ("gpt_neox", {"partial_rotary_factor": 0.25}),
        ("gpt_neox", {"rope_parameters": None, "rotary_pct": 0.25}),
        ("olmo3", {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": YARN}),
        ("olmo3", {"rope_parameters": YARN}),
        ("phi3", {"rope_parameters": None, "partial_rotary_factor": 0.75}),
        # Phi-3's own length is 4096 where nothing is said, and goes before that of the rotary parameters.
        (
            "phi3-longrope",
            {"max_position_embeddings": 8192, "original_max_position_embeddings": None, "rope_parameters": LONGROPE},
        ),
    ],
)
def test_rotary_fields_are_those_that_transformers_takes(case, change, folders, tmp_path):
    shutil.copytree(folders(case), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    config = {name: value for name, value in config.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    model, params = jlora.load(tmp_path)
    ids = tokens()
    assert difference(model(params, jnp.asarray(ids)), logits_of(theirs, ids)) < 1e-4


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("internlm3", {"attention_bias": False}, "qkv_bias False with bias True is not supported"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm True is not supported"),
        ("ernie4_5_moe", {"use_bias": True}, "use_bias True is not supported"),
        ("hunyuan_v1_moe", {"moe_topk": [1, 2, 1, 2]}, r"moe_topk \[1, 2, 1, 2\] is not supported"),
        ("muse_glimmer", {"text_config": {"layer_rope_theta": [5.0] * 52}}, r"layer_rope_theta: 5\.0 is not supported"),
        ("iquestcoder", {"clip_qkv": 8.0}, r"clip_qkv 8\.0 is not supported"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention True is not supported"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention True is not supported"),
        ("llama", {"hidden_act": "mish"}, "hidden_act 'mish' is not supported"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types has 1 value for 4 layers"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 4}, "layer_types: chunked_attention is not supported"),
        ("llama", {"rope_parameters": {"rope_type": "axial"}}, "rope_type 'axial' is not supported"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' needs 'factor'"),
        (
            "llama",
            {"partial_rotary_factor": 0.5, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            "rope_type 'linear' with a partial_rotary_factor is not supported",
        ),
        ("olmo3", {"rope_parameters": {"sliding_attention": {"rope_type": "axial"}}}, "rope_type 'axial' is not supp"),
        ("olmo3", {"rope_parameters": None, "rope_theta": 1e4}, r"rope_theta 10000\.0 is that of all layers in"),
        ("phi3-longrope", {"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0]}}, "found 1"),
        ("nemotron_h", {"layers_block_type": ["mamba", "rwkv"]}, "layers_block_type: rwkv is not supported"),
        (
            "nemotron_h",
            {"attention_bias": True, "sliding_window": 9},
            "(?s)attention_bias True .*sliding_window 9",
        ),
        ("falcon_h1", {"ssm_multipliers": [1.0, 0.5]}, "ssm_multipliers has 2 values, expected 5"),
        ("gpt_neox", {"hidden_size": 50}, "the width 50 is not a multiple of the 6 attention heads"),
        ("gpt2", {"n_layer": None}, "config.json lacks n_layer"),
        ("llama", {"hidden_size": None, "num_hidden_layers": None}, "lacks hidden_size, num_hidden_layers"),
        ("llama", {"model_type": "mamba9"}, "model_type 'mamba9' is not supported; expected one of llama"),
    ],
)
def test_what_is_not_supported_is_named(case, change, message, folders):
    config = json.loads((folders(case) / "config.json").read_text())
    assert models.build(config)
    with pytest.raises(ValueError, match=message):
        models.build(config | change)
