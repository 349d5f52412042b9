"""Qwen 2 and 2.5: biases on queries, keys and values."""

from jlora.families.family import Family, Layer, Values
from jlora.families.fields import Fields
from jlora.families.gguf import SILU, Gguf, Reading
from jlora.families.kinds import LARGEST, whole
from jlora.families.reading import common, read_windows


def read(fields: Fields) -> Values:
    values = common(fields)
    return values | {"qkv_bias": True, "layers": read_layers(fields, values["num_hidden_layers"])}


def read_layers(fields: Fields, count: int) -> tuple[Layer, ...]:
    window = fields.get("sliding_window", 4096) if fields.get("use_sliding_window", False) else None

    def default() -> list[bool]:
        if not window:  # then nothing else is read
            return [False] * count
        first = fields.get("max_window_layers", 28, whole(-LARGEST, LARGEST))
        return [i >= first for i in range(count)]

    return tuple(Layer(window=w) for w in read_windows(fields, window, count, default))


FAMILY = Family(
    model_types=("qwen2",),
    class_name="Qwen2ForCausalLM",
    read=read,
    score="Qwen2",
    gguf=Gguf("qwen2", Reading(constants={**SILU, "use_sliding_window": False})),
)
