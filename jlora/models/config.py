"""Everything that a decoder's computation depends on, in one frozen dataclass for every family's config.json."""

import collections
import dataclasses
import json
import warnings
from typing import Any, NamedTuple

from jlora import tree
from jlora.errors import UserError
from jlora.families import FAMILIES
from jlora.families.family import Delta, Experts, Latent, Layer, Mamba, Names, QueryGrowth, Rope, Scales


class Heads(NamedTuple):
    """The numbers of heads of queries and of keys (there are as many of values), and the width of all of them."""

    queries: int
    keys: int
    width: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder's settings.

    Attributes:
        layers: one entry for each layer.
        hidden_act: the MLP's activation, one of `jlora.models.layers.ACTIVATIONS` or LEARNED.
        gated: whether the MLP is down(act(gate) · up), not down(act(up)).
        norm: "rms", "rms_wide" (scaled before rounding), "rms_plus_one" (scaled by 1 + weight), "rms_bare" (not scaled)
            "layer" or "layer_unbiased" (without its bias).
        final_norm: the norm before the head, one of the same; None: `norm`.
        post_norm_eps: what norms after attention and MLP have for `norm_eps`; None: the same.
        qk_norm: the norm of queries and keys: None, "head" (each head by itself), "rotated" (the same, after rotation),
            "bare" (each head, without weights) or "all" (all heads together).
        conv_kernel, conv_bias: how many tokens short convolutions see, and whether these and the linears around them
            have biases.
        attention_gate: whether sigmoids of gates scale what the heads give. Gates come from `Names.output_gate`, or, if
            that is None, from the projection of queries, which gives each head's after its query.
        qkv_by_head: whether a fused projection is laid out head by head, each with its query, key and value.
        parallel: whether attention and MLP read the same input, also normed alike if the MLP has no norm of its own.
        attention_scale: factor of the scores; `inverse_layer_scale` divides it by the layer's number, from 1.
        attention_sinks: whether each head has a score, `sinks`, that takes part in every query's softmax.
        query_growth: how queries grow with their position; None: they do not.
        attention_softcap, final_softcap: s → cap · tanh(s / cap) of scores and logits.
        embedding_norm: whether embeddings are normed, with a norm that has no weights.
        embedding_scale, residual_scale: factors of the embeddings and of what a block adds.
        logits_divisor: what logits are divided by.
        value_norm: whether values are normed, head by head, with a norm that has no weights.
        hidden_size_per_layer_input: the width of what each layer reads of every token besides the layer before
            (Gemma 3n's per-layer embeddings); 0: nothing. There are `vocab_size_per_layer_input` rows of it.
        layer_scalar: whether each layer's output is multiplied by a number of its own.
        source: the whole config.json, to write it back.
        folder: where the other parts of a model that also sees or hears are, to copy them when it is written.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    layers: tuple[Layer, ...]
    ropes: tuple[Rope, ...] = ()
    names: Names = Names()
    hidden_act: str = "silu"
    gated: bool = True
    norm: str = "rms"
    final_norm: str | None = None
    post_norm_eps: float | None = None
    qk_norm: str | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    attention_gate: bool = False
    qkv_by_head: bool = False
    parallel: bool = False
    attention_scale: float = 1.0
    inverse_layer_scale: bool = False
    attention_sinks: bool = False
    query_growth: QueryGrowth | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    embedding_norm: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_divisor: float = 1.0
    value_norm: bool = False
    hidden_size_per_layer_input: int = 0
    vocab_size_per_layer_input: int = 0
    layer_scalar: bool = False
    experts: Experts | None = None
    delta: Delta | None = None
    conv_kernel: int = 0
    conv_bias: bool = False
    latent: Latent | None = None
    mamba: Mamba | None = None
    scales: Scales = Scales()
    eos_token_ids: tuple[int, ...] = ()
    source: str = dataclasses.field(default="{}", repr=False)
    folder: str | None = None

    def to_hf(self) -> dict[str, Any]:
        """The config.json that this was made from, with every key."""
        return json.loads(self.source)

    def with_field(self, name: str, value: Any) -> "ModelConfig":
        """The config with another value of a field that has the same name in config.json, there too."""
        written = FAMILIES[self.model_type].with_field(self.to_hf(), name, value)
        return dataclasses.replace(self, source=json.dumps(written, sort_keys=True), **{name: value})

    @property
    def interleaved(self) -> bool:
        """Whether rotations turn neighbouring values together."""
        return any(rope.interleaved for rope in self.ropes)

    def positions_before(self, new_tokens: int) -> int | None:
        """The longest text that this many new tokens can follow (the last is never read); None: any length."""
        return None if self.names.positions is None else self.max_position_embeddings - new_tokens + 1

    @property
    def longest_text(self) -> int:
        """The longest text, in tokens, that the model's positions are made for, with rotary scaling."""
        scaled = [int(rope.factor * rope.original_max_position_embeddings) for rope in self.ropes]
        return max([self.max_position_embeddings, *scaled])

    def warn_beyond(self, tokens: int, what: str) -> None:
        """Warns if texts are longer than the model's positions are made for.

        Args:
            tokens: length of the longest text.
            what: what the warning calls the texts.
        """
        if self.ropes and tokens > self.longest_text:
            warnings.warn(
                f"{what}: up to {tokens} tokens, but the model was made for texts of up to {self.longest_text} "
                "(max_position_embeddings and rotary scaling in config.json): results for later tokens are unreliable",
                stacklevel=3,
            )

    def heads(self, layer: Layer) -> Heads:
        """The numbers of heads of a layer's attention, and their width."""
        keys = layer.num_key_value_heads or self.num_key_value_heads
        return Heads(self.num_attention_heads, keys, layer.head_dim or self.head_dim)

    def cache_stack(self, layer: Layer) -> str:
        """The name of the layer's stack in the cache: layers that keep the same share one."""
        if layer.mixer != "attention":
            return layer.mixer
        heads = self.heads(layer)
        return f"attention {heads.keys}x{heads.width}"

    @property
    def slots(self) -> tuple[int, ...]:
        """The number of every layer among those that share its stack in the cache."""
        counts: collections.Counter[str] = collections.Counter()
        found = []
        for layer in self.layers:
            stack = self.cache_stack(layer)
            found.append(counts[stack])
            counts[stack] += layer.shares is None
        return tuple(found)

    @property
    def structures(self) -> tuple[Layer, ...]:
        """What layers must agree in to share a stack."""
        return tuple(layer.structure for layer in self.layers)

    @property
    def stacks(self) -> tuple[range, ...]:
        """The layers of each stack: those with the same structure share one."""
        return tuple(tree.stack_ranges(self.structures))

    def require_same(self, other: "ModelConfig", ours: str, theirs: str) -> None:
        """Raises UserError unless both compute the same from the same weights.

        End-of-text tokens, the length of texts in training, and whatever else config.json and generation_config.json
        say may differ.

        Args:
            ours, theirs: what the message calls the two.

        Raises:
            ValueError: settings of the computation differ; all are listed.
        """
        pair = (self._computation(), other._computation())
        if lines := [line for name in pair[0] for line in _differences(name, *(values[name] for values in pair))]:
            raise UserError(f"{ours} and {theirs} are not models of one architecture:\n  " + "\n  ".join(lines))

    def _computation(self) -> dict[str, Any]:
        """The fields that determine what is computed from the weights."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["ropes"] = tuple(rope.without_idle_lengths() for rope in self.ropes)
        values["max_position_embeddings"] *= self.names.positions is not None
        return {name: value for name, value in values.items() if name not in ("source", "folder", "eos_token_ids")}


def _differences(name: str, one: Any, other: Any) -> list[str]:
    """A line for each difference, entry by entry if the field is a tuple."""
    if type(one) is type(other) is tuple and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [line for index, pair in pairs for line in _differences(f"{name}[{index}]", *pair)]
    return [] if one == other else [f"{name}: {one!r} and {other!r}"]
