"""EXAONE 4: norms after attention and MLP, and layers with a window between layers without positions."""

import functools

from jlora.families import olmo2
from jlora.families.family import Family, Layer, Values
from jlora.families.fields import Fields
from jlora.families.gguf import QK_NORMS, Config, Gguf, Metadata, Reading, heads, windows
from jlora.families.kinds import LENGTH, SIZE
from jlora.families.reading import common, nullable, read_windows

PERIOD = 4  # layers


def read(fields: Fields) -> Values:
    values = common(fields, norm_eps=1e-5)
    count = values["num_hidden_layers"]
    window = nullable(fields, "sliding_window", 4096, LENGTH)

    def usual() -> list[bool]:
        period = fields.get("sliding_window_pattern", PERIOD, SIZE) if window else 1
        return [(i + 1) % period != 0 for i in range(count)]

    found = read_windows(fields, window, count, usual)
    rotated = [window is None or own is not None for own in found]
    layers = tuple(Layer(window=w, rope=0 if turn else None) for w, turn in zip(found, rotated, strict=True))
    return values | {"qk_norm": "head", "layers": layers}


def from_gguf(metadata: Metadata, config: Config, *, period: int) -> Config:
    found = windows(metadata, config, window=None, period=period)
    return heads(metadata, config) | {"sliding_window": None} | found


FAMILY = Family(
    model_types=("exaone4",),
    class_name="Exaone4ForCausalLM",
    read=read,
    names=olmo2.FAMILY.names,
    score="Exaone4",
    gguf=Gguf("exaone4", Reading(more=functools.partial(from_gguf, period=PERIOD)), modules=QK_NORMS, period=PERIOD),
)
