"""SmolLM3: some layers without positions (NoPE, Kazemnejad et al. 2023)."""

from jlora.families import llama
from jlora.families.family import Family, Layer, Values
from jlora.families.fields import Fields
from jlora.families.gguf import BIASES, SILU, Gguf, Reading
from jlora.families.kinds import SIZE, WHOLES_OR_FLAGS
from jlora.families.layouts import INTERLEAVED
from jlora.families.reading import common, read_windows, require_length


def read(fields: Fields) -> Values:
    values = llama.read(fields) | common(fields, num_key_value_heads=4, rope_theta=2e6, tied=True)
    count = values["num_hidden_layers"]
    rotated = fields.get("no_rope_layers", kind=WHOLES_OR_FLAGS)
    if rotated is None:
        interval = fields.get("no_rope_layer_interval", 4, SIZE)
        rotated = [(i + 1) % interval != 0 for i in range(count)]
    rotated = rotated[:count]  # transformers ignores the rest of a longer list
    require_length(fields, "no_rope_layers", rotated, count)
    window = fields.get("sliding_window") if fields.get("use_sliding_window", False) else None
    windows = read_windows(fields, window, count, lambda: [window is not None and not turn for turn in rotated])
    layers = tuple(Layer(window=w, rope=0 if turn else None) for w, turn in zip(windows, rotated, strict=False))
    return values | {"layers": layers}


FAMILY = Family(
    model_types=("smollm3",),
    class_name="SmolLM3ForCausalLM",
    read=read,
    score="SmolLM3",
    gguf=Gguf(
        "smollm3",
        Reading(constants={**SILU, "no_rope_layer_interval": 4, "use_sliding_window": False}, biases=BIASES),
        layouts=INTERLEAVED,
    ),
)
