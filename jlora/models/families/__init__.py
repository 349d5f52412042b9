"""model_type → the function that reads its config.json. A family is data: one decoder computes them all."""

from collections.abc import Callable

from jlora.models.config import Fields
from jlora.models.families import gemma, gpt, llama, qwen

FAMILIES: dict[str, Callable[[Fields], llama.Values]] = {
    "llama": llama.llama,
    "internlm3": llama.internlm3,
    "iquestcoder": llama.iquestcoder,
    "mistral": llama.mistral,
    "mixtral": llama.mixtral,
    "smollm3": llama.smollm3,
    "olmo2": llama.olmo2,
    "granite": llama.granite,
    "phi3": llama.phi3,
    "qwen2": qwen.qwen2,
    "qwen3": qwen.qwen3,
    "qwen3_moe": qwen.qwen3_moe,
    "gemma": gemma.gemma,
    "gemma2": gemma.gemma2,
    "gemma3_text": gemma.gemma3,
    "gpt2": gpt.gpt2,
    "gpt-sw3": gpt.gpt2,
    "gpt_neox": gpt.gpt_neox,
}

# Fields of transformers' configs that do not change the logits of a causal language model: documentation, training and
# generation settings, and dropout, which jlora has only in adapters.
HARMLESS = frozenset(
    (
        *("architectures", "dtype", "id2label", "label2id", "num_labels", "problem_type", "return_dict", "torch_dtype"),
        *(
            "output_attentions",
            "output_hidden_states",
            "transformers_version",
            "_name_or_path",
            "chunk_size_feed_forward",
        ),
        *("is_encoder_decoder", "is_decoder", "cross_attention_hidden_size", "pretraining_tp", "use_cache"),
        *(
            "initializer_range",
            "bos_token_id",
            "pad_token_id",
            "sep_token_id",
            "decoder_start_token_id",
            "task_specific_params",
        ),
        *("attention_dropout", "hidden_dropout", "classifier_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"),
        *("summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
        *("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),
    )
)
