"""What there is to say about a family of models, and what its config.json is read into."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from jlora.families.fields import Fields
    from jlora.families.gguf import Gguf
    from jlora.families.multimodal import TextHalf

Values = dict[str, Any]
# The module of a reward or value model's scalar head, in every family; in an adapter its only leaf is `trained_kernel`.
SCORE = "score"
# How an expert's kernel lies in a tensor of all experts (`Family.stacked_experts`).
IN_OUT, OUT_IN = "in_out", "out_in"


class LayerInputs(NamedTuple):
    """The names of what gives each layer an input of its own for every token (Gemma 3n's per-layer embeddings)."""

    embedding: str = "embed_tokens_per_layer"
    projection: str = "per_layer_model_projection"
    norm: str = "per_layer_projection_norm"
    # inside of a layer
    gate: str = "per_layer_input_gate"
    output: str = "per_layer_projection"
    output_norm: str = "post_per_layer_input_norm"

    @property
    def outside(self) -> tuple[str, ...]:
        """The modules outside of the stack."""
        return self.embedding, self.projection, self.norm


class Names(NamedTuple):
    """The paths of a model's parts in its tree, as Hugging Face names them."""

    stack: str = "layers"
    embedding: str = "embed_tokens"
    positions: str | None = None
    norm: str | None = "norm"  # None: it has no weights
    head: str = "lm_head"
    attention: str = "self_attn"
    # (kind of layer, the name of what mixes tokens in it), where that is not `attention`; None: the layer's own modules
    mixers: tuple[tuple[str, str | None], ...] = ()
    queries_keys_values: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    output: str = "o_proj"
    # the linear that gives gates of what heads give, if these have one of their own
    output_gate: str | None = None
    # what `output` is called in layers of other kinds
    mixer_outputs: tuple[str, ...] = ()
    qk_norms: tuple[str, str] = ("q_norm", "k_norm")
    router: str = "gate"
    mlp: str = "mlp"
    mlp_up: tuple[str, ...] = ("gate_proj", "up_proj")
    mlp_down: str = "down_proj"
    activation: str | None = None  # of the MLP, if it may have parameters
    shared_expert: str = "shared_expert"
    # before and after the experts, if these compute in a narrower space (`Experts.latent_size`)
    expert_latents: tuple[str, str] = ("fc1_latent_proj", "fc2_latent_proj")
    # linears to something narrow that all heads share, which every device has whole
    latents: tuple[str, ...] = ()
    # (norm before, norm after) of attention and of the MLP
    attention_norms: tuple[str | None, str | None] = ("input_layernorm", None)
    mlp_norms: tuple[str | None, str | None] = ("post_attention_layernorm", None)
    layer_inputs: LayerInputs | None = None

    def mixer(self, kind: str) -> str | None:
        """The name of a layer's module that mixes tokens; None: its parts are modules of the layer itself.

        Args:
            kind: a name of `jlora.models.mixers.MIXERS`.
        """
        return dict(self.mixers).get(kind, self.attention)

    @property
    def outside(self) -> tuple[str, ...]:
        """The modules outside of the stack."""
        own = (self.embedding, self.positions, self.norm, self.head)
        return tuple(path for path in (*own, *(self.layer_inputs.outside if self.layer_inputs else ())) if path)

    @property
    def row_parallel(self) -> tuple[str, ...]:
        """The linears of a layer whose inputs are the outputs of others, and whose outputs are added to the layer's."""
        own = (self.layer_inputs.output,) if self.layer_inputs else ()
        return self.output, *self.mixer_outputs, self.mlp_down, *own

    def below(self, module: str) -> "Names":
        """The same parts inside of a module, but for the head, which stays outside."""

        def moved(names: Any, parts: tuple[str, ...]) -> Any:
            return names._replace(**{part: f"{module}/{path}" for part in parts if (path := getattr(names, part))})

        own = moved(self.layer_inputs, ("embedding", "projection", "norm")) if self.layer_inputs else None
        return moved(self, ("stack", "embedding", "positions", "norm"))._replace(layer_inputs=own)


class ExpertNames(NamedTuple):
    """What programs that serve adapters of single experts (vLLM, SGLang) call a layer's router, experts and linears.

    Attributes:
        mixture: what holds router and experts; "": what does in transformers.
        router: "": transformers' name.
    """

    mixture: str = ""
    router: str = ""
    gate_proj: str = "gate_proj"
    up_proj: str = "up_proj"
    down_proj: str = "down_proj"


class Older(NamedTuple):
    """What transformers 4 calls fields of config.json for which transformers 5 has other names.

    Attributes:
        renamed: transformers 5's name → 4's.
        rotary: the same for those of `rope_parameters`, which were fields of config.json.
        local_theta: the rotary base of layers with a window; None: there is no such field.
        scaling: (rotary scaling, config.json) → `rope_scaling` as transformers 4 accepts it; None: as it is.
    """

    renamed: Mapping[str, str] = {}
    rotary: Mapping[str, str] = {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}
    local_theta: str | None = "rope_local_base_freq"
    scaling: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """Everything about a family that differs from others, in both directions: one file of this package each.

    Attributes:
        model_types: what config.json calls it.
        class_name: transformers' class with a language modelling head.
        read: (config.json's fields) → values for `jlora.models.ModelConfig`.
        names: where its parts are in the tree.
        prefix: what the names of all modules but the head begin with in transformers.
        score: the beginning of the name of transformers' …ForSequenceClassification; None: there is no such class.
        checkpoint_names: (pattern in transformers' names, what checkpoints have instead).
        untransposed: whether linears are stored as [in, out] (transformers' Conv1D).
        stacked_experts: the order of the axes, IN_OUT or OUT_IN, in the one tensor [E, …] that checkpoints have for a
            layer's experts; None: they have them one by one.
        single_experts: the names in adapters that have a layer's experts one by one.
        unpacked: patterns of modules of a layer whose kernels `quant="nf4"` and the like leave as they are.
        refused: the last names of modules for which PEFT opens no adapter (their fused kernels take the weight alone).
        buffers: patterns of tensors in old checkpoints that every loader computes itself.
        spare: patterns of tensors that a checkpoint may have of layers that do not use them.
        mlx_names: (pattern at the beginning of transformers' names, what mlx-lm has instead); the first match counts.
        older: what transformers 4 needs in config.json; None: it does not know such models.
        gguf: how llama.cpp's files hold such a model; None: jlora neither reads nor writes these.
        half: where its language model is, if it has other parts too.
    """

    model_types: tuple[str, ...]
    class_name: str
    read: Callable[["Fields"], Values]
    names: Names = Names()
    prefix: str = "model."
    score: str | None = None
    checkpoint_names: tuple[tuple[str, str], ...] = ()
    untransposed: bool = False
    stacked_experts: str | None = None
    single_experts: ExpertNames = ExpertNames()
    unpacked: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    buffers: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)
    spare: tuple[str, ...] = ()
    mlx_names: tuple[tuple[str, str], ...] = ()
    older: Older | None = Older()
    gguf: "Gguf | None" = None
    half: "TextHalf | None" = None

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The language model's settings in a parsed config.json: all of it, unless there are other parts."""
        return self.half.settings(config) if self.half else dict(config)

    def with_field(self, config: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
        """config.json with another value of one of the language model's settings."""
        return self.half.with_field(config, name, value) if self.half else {**config, name: value}

    def hub_name(self, path: str) -> str:
        """transformers' name of the stack or of the module outside of it at `path`: layers → model.layers."""
        name = path.replace("/", ".")
        return name if path == self.names.head or name.startswith(self.prefix) else self.prefix + name


class Layer(NamedTuple):
    """The settings in which a decoder layer may differ from its neighbours.

    Attributes:
        window: keys this many or more positions back are not seen; None: all are seen.
        rope: the index in `ModelConfig.ropes` of the rotation of its queries and keys; None: they are not rotated.
        experts: whether its MLP is a mixture of experts.
        mixer: what mixes tokens, a name of `jlora.models.mixers.MIXERS`.
        mlp: whether there is an MLP, or a mixture of experts, after that.
        head_dim, num_key_value_heads, intermediate_size: None: the model's.
        keys_as_values: whether what the keys are made of serves as values too.
        keeps, shares: a name under which the layer's keys and values are kept for later layers, and under which it
            takes those of an earlier layer instead of its own; None: neither.
    """

    window: int | None = None
    rope: int | None = 0
    experts: bool = False
    mixer: str = "attention"
    mlp: bool = True
    head_dim: int | None = None
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None
    keys_as_values: bool = False
    keeps: str | None = None
    shares: str | None = None

    @property
    def structure(self) -> "Layer":
        """The layer without what is only data to the program that computes it; equal ones can share a stack."""
        return self._replace(window=None, rope=None)


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions: the fields of `rope_parameters`, and what transformers derives from other fields.

    Attributes:
        dim: how many values of a head are rotated.
        attention_factor: factor of cos and sin.
        max_position_embeddings: the length beyond which "dynamic" stretches.
        interleaved: whether neighbouring values are rotated together, rather than those of a head's two halves.
        clockwise: whether the angles are negative.
        partial_rotary_factor: the share of the frequencies that are not 0, for "proportional".
    """

    dim: int
    rope_theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    partial_rotary_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    interleaved: bool = False
    clockwise: bool = False

    def without_idle_lengths(self) -> "Rope":
        """The same rotation, without the lengths that its type does not use."""
        idle = () if self.rope_type in ("llama3", "yarn", "longrope") else ("original_max_position_embeddings",)
        idle += () if self.rope_type == "dynamic" else ("max_position_embeddings",)
        return dataclasses.replace(self, **dict.fromkeys(idle, 0))


class Clamped(NamedTuple):
    """The gated product gate · sigmoid(alpha · gate) · (up + 1), of gate up to `limit` and up between -limit and limit.

    It is gpt-oss's.
    """

    alpha: float
    limit: float


class QueryGrowth(NamedTuple):
    """Queries at position p are multiplied by 1 + beta · log(1 + floor(p / length)) (Llama 4's temperature)."""

    beta: float
    length: int


class Beside(NamedTuple):
    """The names of norms: of the dense MLP's outputs, of the experts' inputs, and of their outputs.

    Attributes:
        before: None: the experts and their router read what the MLP reads.
        module: the name of the experts' module; None: router and experts are the layer's own.
    """

    dense: str | None = None
    before: str | None = None
    after: str | None = None
    module: str | None = None


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts: every token goes to the `top_k` experts that the router finds likeliest.

    Attributes:
        count: number of experts.
        intermediate_size: inner width of one expert.
        normalize: whether the chosen experts' probabilities are scaled to a sum of 1. (A softmax over the chosen ones
            alone is the same.)
        router_bias: whether the router has a bias.
        bias: whether the experts' linears have biases.
        interleaved: whether gate and up alternate in the columns of `gate_up_proj`, instead of one following the other.
        clamped: the gated product; None: act(gate) · up.
        shared_intermediate_size: inner width of an MLP for every token beside the experts; 0: there is none.
        shared_gate: whether the output of that MLP is scaled by a sigmoid of its own for each token.
        sigmoid: whether scores are sigmoids of float32 logits, rather than a softmax over all experts.
        correction: whether the router has numbers that are added to scores to choose experts, but not to weigh them.
        correction_row: whether files have these numbers as the row of a matrix.
        groups, top_groups: experts are chosen from the `top_groups` best of so many equal groups.
        least: what a sum of weights is kept away from zero by, where weights are divided by it.
        scaling: factor of the weights.
        beside: what is around the experts where these are beside the dense MLP; None: they take the MLP's place.
        scaled: whether the router norms its inputs and multiplies them, and the weights, by learned numbers.
        latent_size: the width of what linears make of the experts' inputs, and of their outputs before another; 0: the
            model's.
    """

    count: int
    top_k: int
    intermediate_size: int
    normalize: bool
    router_bias: bool = False
    bias: bool = False
    interleaved: bool = False
    clamped: "Clamped | None" = None
    shared_intermediate_size: int = 0
    shared_gate: bool = False
    sigmoid: bool = False
    correction: bool = False
    correction_row: bool = False
    groups: int = 1
    top_groups: int = 1
    least: float = 1e-20
    scaling: float = 1.0
    beside: "Beside | None" = None
    scaled: bool = False
    latent_size: int = 0


@dataclasses.dataclass(frozen=True)
class Latent:
    """The sizes of latent attention (MLA), as config.json calls them.

    Attributes:
        q_lora_rank: width of what queries are made from; None: they are made at once.
        kv_lora_rank: width of what keys and values are made from.
        qk_nope_head_dim, qk_rope_head_dim: widths of the parts of a query and a key that are not rotated and that are.
        v_head_dim: width of a value.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def qk_head_dim(self) -> int:
        """The width of a query and a key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclasses.dataclass(frozen=True)
class Delta:
    """Gated delta nets (Yang et al. 2024): layers with a matrix of state for each head in place of attention.

    Attributes:
        key_heads, value_heads: each of the first serves several neighbours of the second.
        key_dim, value_dim: the widths of their heads.
        conv_kernel: how many tokens the convolution of queries, keys and values sees.
        fused: whether one linear gives queries, keys, values and gates, key head by key head, and another rates and
            decays; otherwise there are four, with all heads of a kind together.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv_kernel: int
    fused: bool = False

    @property
    def channels(self) -> int:
        """How many values the convolution mixes: queries, keys and values of all heads."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def state(self) -> int:
        """How many values the state of a layer has."""
        return self.value_heads * self.key_dim * self.value_dim


class Scales(NamedTuple):
    """Factors of what goes into parts of a layer, and of what comes out (the multipliers of µP, Yang et al. 2022).

    Attributes:
        projected: of the gates, inputs, keys, queries and steps of Mamba-2 mixers.
        gate: of what an MLP's activation reads.
    """

    attention_in: float = 1.0
    attention_out: float = 1.0
    mamba_in: float = 1.0
    mamba_out: float = 1.0
    projected: tuple[float, ...] = (1.0,) * 5
    gate: float = 1.0
    mlp_out: float = 1.0


@dataclasses.dataclass(frozen=True)
class Mamba:
    """Mamba-2 mixers (Dao and Gu 2024): a matrix of state for each head, that decays at every token by its own step.

    Attributes:
        heads, head_dim: of the inputs.
        groups: how many keys and queries (Mamba's B and C) there are; each serves several neighbouring heads, and the
            norm of what these give has statistics of its own.
        state_size: the width of a key and a query.
        conv_kernel: how many tokens the convolution of inputs, keys and queries sees.
        conv_bias, bias, output_bias: whether the convolution and the linears before and after have biases.
        step_limits: the shortest and the longest step.
        activation: of what the convolution gives.
        norm: what is normed of what heads give: "gated", "ungated" (before the gate) or None.
    """

    heads: int
    head_dim: int
    groups: int
    state_size: int
    conv_kernel: int
    conv_bias: bool = True
    bias: bool = False
    output_bias: bool = False
    step_limits: tuple[float, float] = (0.0, math.inf)
    activation: str = "silu"
    norm: str | None = "gated"

    @property
    def inner(self) -> int:
        """How many inputs all heads have."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """How many values the convolution mixes: inputs, keys and queries."""
        return self.inner + 2 * self.groups * self.state_size
