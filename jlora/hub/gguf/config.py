"""Turns a GGUF file's metadata into the config.json that the same model has on the Hub."""

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jlora.errors import UserError

# GGUF's names for per-dimension divisors of the rotary frequencies.
FREQUENCIES, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
ROTARY = frozenset((FREQUENCIES, SHORT, LONG))
# Llama 3's rope scaling as Meta published it; GGUF keeps only the divisors it leads to.
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_CONTEXT = 1.0, 4.0, 8192
# YaRN's settings: config.json's name → GGUF's.
YARN = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow", "attention_factor": "yarn_attn_factor"}

# Keys below the architecture's name that do not change what a causal language model computes.
HARMLESS = frozenset(("vocab_size", "tensor_data_layout", "pooling_type", "rope.scaling.finetuned"))
# Key → the only values that jlora computes: causal attention, and softmax routing without a factor.
ONLY = {"attention.causal": (True,), "expert_gating_func": (0, 1), "expert_weights_scale": (0.0, 1.0)}


class Metadata:
    """A file's metadata, with a record of the keys that were read and the problems that were found.

    Keys are given without the architecture's name: "block_count" means "llama.block_count".
    """

    def __init__(self, path: Path, fields: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> None:
        self.path, self.fields, self.tensors = path, fields, tensors
        self.architecture = str(fields.get("general.architecture"))
        self.seen: set[str] = set()
        self.problems: list[str] = []

    def name(self, key: str) -> str:
        """The full key."""
        return f"{self.architecture}.{key}"

    def get(self, key: str, default: Any = None) -> Any:
        """The value; `default` if there is none."""
        self.seen.add(key)
        value = self.fields.get(self.name(key), default)
        return _shortest(value) if isinstance(value, float) else value

    def number(self, key: str, default: Any = None) -> Any:
        """The value, or that of a list with one value per layer; notes a problem if these differ."""
        value = self.get(key, default)
        if isinstance(value, list) and len(set(value)) != 1:
            self.problems.append(f"{self.name(key)} differs from layer to layer: {value}")
        return value[0] if isinstance(value, list) and value else value

    def require(self, key: str) -> Any:
        """The value; if it is missing or 0, notes a problem and returns 1, so that reading can go on to `finish`."""
        value = self.number(key)
        if value is None:
            self.problems.append(f"no metadata {self.name(key)}")
        elif value == 0 and not isinstance(value, bool):
            self.problems.append(f"{self.name(key)} is 0")
        return value if value or isinstance(value, bool) else 1

    def only(self, key: str, *supported: Any) -> None:
        """Notes a problem if there is a value that is not supported."""
        value = self.number(key)
        if value is not None and value not in supported:
            expected = " or ".join(map(str, supported))
            self.problems.append(f"{self.name(key)} is {value}; jlora computes only {expected}")

    def finish(self) -> None:
        """Raises ValueError with all problems: those noted, and keys that were never read."""
        prefix = self.name("")
        known = self.seen | HARMLESS
        for name, value in self.fields.items():
            key = name.removeprefix(prefix)
            # Converters write zeros for what a model does not have.
            if name.startswith(prefix) and key not in known and value not in (0, None, ""):
                self.problems.append(f"{name} is {value!r}, which is not supported")
        if self.problems:
            raise UserError(f"{self.path} cannot be read as a model:\n  " + "\n  ".join(self.problems))


Config = dict[str, Any]
Read = Callable[[Metadata, Config], Config]


class Architecture(NamedTuple):
    """How one of GGUF's architectures becomes a config.json.

    Attributes:
        required, optional: config.json's name → GGUF's; an optional one that is absent or 0 is left out.
        more: computes the other fields that follow from the metadata.
        constants: fields that GGUF does not have, because llama.cpp always computes them so.
        biases: config.json's name → a tensor that exists if the field is true.
        theta, share: config.json's names of the rotary base (None: no rotary positions) and of the share of a head that
            is rotated (None: always all of it).
    """

    model_type: str
    class_name: str
    required: Mapping[str, str]
    more: Read
    optional: Mapping[str, str] = {}
    constants: Mapping[str, Any] = {}
    biases: Mapping[str, str] = {}
    theta: str | None = "rope_theta"
    share: str | None = None


def read_config(
    path: Path, fields: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], values: Callable[[str], np.ndarray]
) -> Config:
    """The config.json that the model would have on the Hub.

    Args:
        path: the file, for messages.
        fields: all metadata but the vocabulary.
        tensors: GGUF's name → shape, slowest axis first.
        values: (a tensor's GGUF name) → its values.

    Raises:
        ValueError: the architecture is not one of `ARCHITECTURES`, or keys are missing or ask for what jlora does not
            compute; all keys are listed.
    """
    metadata = Metadata(path, fields, tensors)
    if metadata.architecture not in ARCHITECTURES:
        found, known = fields.get("general.architecture"), ", ".join(ARCHITECTURES)
        raise UserError(f"{path} has architecture {found!r}; GGUF is read for {known}")
    architecture = _variant(metadata)
    config = {
        **{name: metadata.require(key) for name, key in architecture.required.items()},
        **{name: value for name, key in architecture.optional.items() if (value := metadata.number(key))},
        **architecture.constants,
        **{name: tensor in tensors for name, tensor in architecture.biases.items()},
        **special_tokens(fields),
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    config |= _vocabulary(metadata)
    config |= architecture.more(metadata, config)
    if architecture.theta:
        config |= _rotary(metadata, config, architecture, values)
    for key, supported in ONLY.items():
        metadata.only(key, *supported)
    if fields.get("split.count", 0) > 1:
        metadata.problems.append(f"split.count is {fields['split.count']}: merge the parts with llama-gguf-split first")
    metadata.finish()
    return config


def special_tokens(fields: Mapping[str, Any]) -> Config:
    """The ids of the tokens that begin, end and pad a text."""
    keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    found = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    return {name: value for name, value in found.items() if value is not None}


def generation_config(fields: Mapping[str, Any]) -> Config | None:
    """generation_config.json, or None; chat models may end a turn and a text with different tokens."""
    tokens = special_tokens(fields)
    eos, end_of_turn = tokens.get("eos_token_id"), fields.get("tokenizer.ggml.eot_token_id")
    if eos is not None and end_of_turn is not None and end_of_turn != eos:
        tokens["eos_token_id"] = [eos, end_of_turn]
    return tokens or None


def _variant(metadata: Metadata) -> Architecture:
    for name, key, variant in VARIANTS:
        if name == metadata.architecture and metadata.number(key):
            return variant
    return ARCHITECTURES[metadata.architecture]


def _vocabulary(metadata: Metadata) -> Config:
    if "token_embd.weight" not in metadata.tensors:
        metadata.problems.append("no tensor token_embd.weight")
    return {"vocab_size": metadata.tensors.get("token_embd.weight", (1,))[0]}


def _shortest(value: float) -> float:
    """The shortest decimal that rounds to the float32 `value`: 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _heads(metadata: Metadata, config: Config) -> Config:
    """The size of a head, and the number of heads of keys and values."""
    heads = config["num_attention_heads"]
    usual = metadata.number("rope.dimension_count", config["hidden_size"] // heads)
    head_dim = metadata.number("attention.key_length", usual)
    metadata.only("attention.value_length", head_dim)
    groups = metadata.number("attention.head_count_kv", heads)
    return {"head_dim": head_dim, "num_key_value_heads": groups}


def _even_heads(metadata: Metadata, width: int, heads: int) -> None:
    """Notes a problem if the heads do not divide the width evenly."""
    for key in ("attention.key_length", "attention.value_length"):
        metadata.only(key, width // heads)


def _phi3(metadata: Metadata, config: Config) -> Config:
    # Only part of a head may be rotated, so its size does not follow from rope.dimension_count.
    heads = config["num_attention_heads"]
    _even_heads(metadata, config["hidden_size"], heads)
    return {"num_key_value_heads": metadata.number("attention.head_count_kv", heads)}


def _gpt(metadata: Metadata, config: Config, *, width: str, heads: str) -> Config:
    metadata.only("attention.head_count_kv", config[heads])
    _even_heads(metadata, config[width], config[heads])
    return {}


def _granite(metadata: Metadata, config: Config) -> Config:
    # Only for Granite does this key say whether positions are rotated at all.
    metadata.only("rope.scaling.finetuned", True)
    return _heads(metadata, config)


def _gemma(metadata: Metadata, config: Config, *, window: int | None, period: int, largest: int) -> Config:
    """Gemma 2 and 3: layers with a window, and the scores' scale, which llama.cpp infers from the number of layers."""
    heads = _heads(metadata, config)
    count = config["num_hidden_layers"]
    window = metadata.number("attention.sliding_window", window)
    pattern = metadata.get("attention.sliding_window_pattern", period)
    sliding = pattern if isinstance(pattern, list) else [i % pattern < pattern - 1 for i in range(count)]
    shared = config["hidden_size"] // config["num_attention_heads"]
    return {
        **heads,
        **({"sliding_window": window} if window else {}),
        "layer_types": ["sliding_attention" if window and slides else "full_attention" for slides in sliding],
        "query_pre_attn_scalar": shared if count == largest else heads["head_dim"],
    }


def _gemma3(metadata: Metadata, config: Config) -> Config:
    local = metadata.get("rope.freq_base_swa", 10000.0)
    return _gemma(metadata, config, window=None, period=6, largest=62) | {"rope_local_base_freq": local}


def _rotary(
    metadata: Metadata, config: Config, architecture: Architecture, values: Callable[[str], np.ndarray]
) -> Config:
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    turned = metadata.number("rope.dimension_count", head_dim)
    theta = metadata.get("rope.freq_base", 10000.0)
    found = {architecture.theta: theta}
    if architecture.share:
        found[architecture.share] = _share(turned, head_dim)
    elif turned != head_dim:
        metadata.problems.append(
            f"{metadata.name('rope.dimension_count')}: {turned} of {head_dim} values of a head are rotated; "
            f"partial rotation is not supported for {metadata.architecture}"
        )
    return found | _rope_scaling(metadata, config, values, theta=theta, turned=turned)


def _share(part: int, whole: int) -> float:
    """The fraction f for which int(whole · f), which readers compute, is `part`."""
    share = part / whole
    return share if int(whole * share) == part else math.nextafter(share, 1.0)


def _rope_scaling(
    metadata: Metadata, config: Config, values: Callable[[str], np.ndarray], *, theta: float, turned: int
) -> Config:
    kind = metadata.get("rope.scaling.type", "linear")
    factor = metadata.get("rope.scaling.factor", metadata.get("rope.scale_linear"))
    original = metadata.get("rope.scaling.original_context_length")
    if {SHORT, LONG} & set(metadata.tensors):
        return _longrope(metadata, config, values, original=original)
    if kind != "yarn":
        metadata.only("rope.scaling.attn_factor", 1.0)
    if FREQUENCIES in metadata.tensors:
        return _llama3(metadata, values(FREQUENCIES), theta=theta, turned=turned)
    if kind == "none" or (kind == "linear" and factor in (None, 0.0, 1.0)):
        return {}
    if kind == "linear":
        return {"rope_scaling": {"rope_type": "linear", "factor": factor}}
    if kind == "yarn":
        return _yarn(metadata)
    supported = f"linear, yarn, Llama 3's ({FREQUENCIES}) and LongRoPE ({SHORT}, {LONG}) are read"
    metadata.problems.append(f"{metadata.name('rope.scaling.type')} is {kind!r}; {supported}")
    return {}


def _yarn(metadata: Metadata) -> Config:
    """YaRN (Peng et al. 2023)."""
    metadata.only("rope.scaling.yarn_ext_factor", 1.0, -1.0)  # -1 means on in llama.cpp
    found = {name: metadata.get(f"rope.scaling.{key}") for name, key in YARN.items()}
    # llama.cpp multiplies the usual factor by this; it does not use what its converter writes for a model's own factor.
    ratio = metadata.get("rope.scaling.attn_factor", 1.0)
    if ratio != 1:
        found["attention_factor"] = ratio * yarn_attention(metadata.require("rope.scaling.factor"))
    scaling = {
        "rope_type": "yarn",
        "factor": metadata.require("rope.scaling.factor"),
        "original_max_position_embeddings": metadata.require("rope.scaling.original_context_length"),
        **{name: value for name, value in found.items() if value is not None},
    }
    return {"rope_scaling": scaling}


def yarn_attention(factor: float) -> float:
    """YaRN's default factor of cos and sin."""
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


def _longrope(
    metadata: Metadata, config: Config, values: Callable[[str], np.ndarray], *, original: int | None
) -> Config:
    """LongRoPE (Ding et al. 2024): one list of divisors for short texts and one for long ones."""
    longest = config["max_position_embeddings"]
    original = original or longest
    scaling: Config = {"rope_type": "longrope"}
    for name, tensor in (("short_factor", SHORT), ("long_factor", LONG)):
        if tensor not in metadata.tensors:
            metadata.problems.append(f"no tensor {tensor}")
        else:
            scaling[name] = [_shortest(float(value)) for value in values(tensor)]
    usual = math.sqrt(1 + math.log(longest / original) / math.log(original)) if longest > original else 1.0
    attention = metadata.get("rope.scaling.attn_factor", usual)
    if not math.isclose(attention, usual, rel_tol=1e-5):
        scaling["attention_factor"] = attention
    return {"rope_scaling": scaling, "original_max_position_embeddings": original}


def _llama3(metadata: Metadata, divisors: np.ndarray, *, theta: float, turned: int) -> Config:
    """Llama 3's parameters that give these divisors of the rotary frequencies; they are computed again as a check."""
    factor = round(float(divisors.max()), 3)
    wavelengths = 2 * math.pi * theta ** (np.arange(0, turned, 2) / turned)
    kept = np.clip((LLAMA3_CONTEXT / wavelengths - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW), 0, 1)
    expected = 1 / (kept + (1 - kept) / factor)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-5):
        metadata.problems.append(f"{FREQUENCIES} is not Llama 3's rope scaling with factor {factor}")
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LLAMA3_LOW,
        "high_freq_factor": LLAMA3_HIGH,
        "original_max_position_embeddings": LLAMA3_CONTEXT,
    }
    return {"rope_scaling": scaling}


SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
DECODER = {**SIZES, "rms_norm_eps": "attention.layer_norm_rms_epsilon"}
NEOX = {
    **SIZES,
    "layer_norm_eps": "attention.layer_norm_epsilon",
    "use_parallel_residual": "use_parallel_residual",
}
GPT2 = {
    "n_embd": "embedding_length",
    "n_layer": "block_count",
    "n_head": "attention.head_count",
    "n_positions": "context_length",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
}
GRANITE = {
    **DECODER,
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
}
GRANITE_OPTIONAL = {"embedding_multiplier": "embedding_scale", "residual_multiplier": "residual_scale"}
SOFT_CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
WINDOW = {"sliding_window": "attention.sliding_window"}
ROUTED = {"num_experts_per_tok": "expert_used_count"}
ATTENTION_BIAS = {"attention_bias": "blk.0.attn_q.bias"}
BIASES = {**ATTENTION_BIAS, "mlp_bias": "blk.0.ffn_gate.bias"}
SILU = {"hidden_act": "silu"}
GELU = {"hidden_activation": "gelu_pytorch_tanh"}

_decoder = functools.partial(Architecture, required=DECODER, more=_heads)
_gemma2 = functools.partial(_gemma, window=4096, period=2, largest=46)
# Models that share a GGUF architecture and differ by a key: (architecture, key that is there and not 0, the variant).
VARIANTS: tuple[tuple[str, str, Architecture], ...] = (
    (
        "llama",
        "expert_count",
        _decoder(
            "mixtral",
            "MixtralForCausalLM",
            required={**DECODER, **ROUTED, "num_local_experts": "expert_count"},
            optional=WINDOW,
            constants=SILU,
        ),
    ),
    ("llama", "attention.sliding_window", _decoder("mistral", "MistralForCausalLM", optional=WINDOW, constants=SILU)),
)
ARCHITECTURES: dict[str, Architecture] = {
    "llama": _decoder("llama", "LlamaForCausalLM", constants=SILU, biases=BIASES),
    "qwen2": _decoder("qwen2", "Qwen2ForCausalLM", constants={**SILU, "use_sliding_window": False}),
    "qwen3": _decoder(
        "qwen3", "Qwen3ForCausalLM", constants={**SILU, "use_sliding_window": False}, biases=ATTENTION_BIAS
    ),
    "qwen3moe": _decoder(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        required={
            **DECODER,
            **ROUTED,
            "num_experts": "expert_count",
            "moe_intermediate_size": "expert_feed_forward_length",
        },
        constants={**SILU, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
        biases=ATTENTION_BIAS,
    ),
    "gemma": _decoder("gemma", "GemmaForCausalLM", constants={"hidden_act": "gelu_pytorch_tanh"}),
    "gemma2": _decoder("gemma2", "Gemma2ForCausalLM", optional=SOFT_CAPS, constants=GELU, more=_gemma2),
    "gemma3": _decoder("gemma3_text", "Gemma3ForCausalLM", optional=SOFT_CAPS, constants=GELU, more=_gemma3),
    "phi3": _decoder(
        "phi3",
        "Phi3ForCausalLM",
        optional={**WINDOW, "original_max_position_embeddings": "rope.scaling.original_context_length"},
        constants=SILU,
        share="partial_rotary_factor",
        more=_phi3,
    ),
    "granite": _decoder(
        "granite",
        "GraniteForCausalLM",
        required=GRANITE,
        optional=GRANITE_OPTIONAL,
        constants=SILU,
        biases=BIASES,
        more=_granite,
    ),
    "smollm3": _decoder(
        "smollm3",
        "SmolLM3ForCausalLM",
        constants={**SILU, "no_rope_layer_interval": 4, "use_sliding_window": False},
        biases=BIASES,
    ),
    "olmo2": _decoder("olmo2", "Olmo2ForCausalLM", constants=SILU, biases=ATTENTION_BIAS),
    "gpt2": Architecture(
        "gpt2",
        "GPT2LMHeadModel",
        required=GPT2,
        optional={"n_inner": "feed_forward_length"},
        constants={"activation_function": "gelu_new"},
        theta=None,
        more=functools.partial(_gpt, width="n_embd", heads="n_head"),
    ),
    # The activation is Pythia's; GGUF does not say which form of GELU a model uses.
    "gptneox": Architecture(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        required=NEOX,
        constants={"hidden_act": "gelu"},
        biases={"attention_bias": "blk.0.attn_qkv.bias"},
        theta="rotary_emb_base",
        share="rotary_pct",
        more=functools.partial(_gpt, width="hidden_size", heads="num_attention_heads"),
    ),
}
