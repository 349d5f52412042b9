"""OLMo 3: OLMo 2 with a window in three of four layers, which are rotated without the YaRN scaling of the others."""

from jlora.families import olmo2
from jlora.families.family import Family, Layer, Older, Values
from jlora.families.fields import Fields
from jlora.families.gguf import ATTENTION_BIAS, Config, Metadata, Reading, heads, windows
from jlora.families.reading import read_windows
from jlora.families.rope import read_rope

PERIOD = 4  # layers
THETA = 500000.0


def read(fields: Fields) -> Values:
    full, local = fields.ropes()
    values = olmo2.read(fields.replaced(rope_parameters=None, rope_scaling=None))
    count, head_dim = values["num_hidden_layers"], values["head_dim"]
    window, theta = fields.get("sliding_window", 4096), fields.get("rope_theta", THETA)
    if theta != THETA and local.get("rope_theta") is None:
        fields.problems.append(
            f"rope_theta {theta} is that of all layers in transformers 4, but not of those with a window in 5; "
            "give rope_parameters with a rope_theta of sliding_attention"
        )
    found = read_windows(fields, window, count, lambda: [(i + 1) % PERIOD != 0 for i in range(count)])
    return values | {
        "ropes": tuple(read_rope(fields, rope, theta=theta, head_dim=head_dim) for rope in (full, local)),
        "layers": tuple(Layer(window=w, rope=0 if w is None else 1) for w in found),
    }


def from_gguf(metadata: Metadata, config: Config) -> Config:
    theta = metadata.get("rope.freq_base", 10000.0)
    metadata.only("rope.freq_base_swa", theta)
    rope = {"rope_type": "default", "rope_theta": theta}
    return {
        **heads(metadata, config),
        **windows(metadata, config, window=None, period=PERIOD),
        "rope_parameters": {"full_attention": rope, "sliding_attention": rope},
    }


FAMILY = Family(
    model_types=("olmo3",),
    class_name="Olmo3ForCausalLM",
    read=read,
    names=olmo2.FAMILY.names,
    score="Olmo3",
    older=Older(local_theta=None),
    gguf=olmo2.FAMILY.gguf._replace(
        reading=Reading(biases=ATTENTION_BIAS, more=from_gguf, mark="attention.sliding_window"), period=PERIOD
    ),
)
