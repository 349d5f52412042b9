"""Command R7B and A: attention and MLP read one norm; layers with a window rotate, the others do not (NoPE)."""

from jlora.families.family import Family, Layer, Names, Values
from jlora.families.fields import Fields
from jlora.families.kinds import NUMBER, POSITIVE, SIZE
from jlora.families.reading import common, interleaved, read_windows

NAMES = Names(mlp_norms=(None, None))
PERIOD = 4  # layers


def read(fields: Fields) -> Values:
    values = read_common(fields, rope_theta=1e4)
    count = values["num_hidden_layers"]
    period = fields.get("sliding_window_pattern", PERIOD, SIZE)
    window = fields.get("sliding_window", 4096)
    windows = read_windows(fields, window, count, lambda: [(i + 1) % period != 0 for i in range(count)])
    return values | {"layers": tuple(Layer(window=window, rope=0 if window else None) for window in windows)}


def read_common(fields: Fields, *, rope_theta: float) -> Values:
    """What the Cohere models read alike."""
    fields.seen.add("head_dim")  # transformers computes it
    bias = fields.get("attention_bias", False)
    values = common(fields.replaced(head_dim=None), rope_theta=rope_theta, tied=True)
    return interleaved(values) | {
        "norm": "layer_unbiased",
        "norm_eps": float(fields.get("layer_norm_eps", 1e-5, NUMBER)),
        "parallel": True,
        "qkv_bias": bias,
        "output_bias": bias,
        "logits_divisor": 1 / fields.get("logit_scale", 0.0625, POSITIVE),
    }


FAMILY = Family(
    model_types=("cohere2",),
    class_name="Cohere2ForCausalLM",
    read=read,
    names=NAMES,
)
