"""A model's config.json as a frozen dataclass with the same names."""

import dataclasses
import json
from typing import Any

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """The fields of `rope_scaling` (transformers 4) or `rope_parameters` (5), under the same names."""

    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What the computation needs of config.json, under its names; `source` keeps the whole file for writing it back."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    eos_token_ids: tuple[int, ...] = ()
    source: str = dataclasses.field(default="{}", repr=False)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "ModelConfig":
        """The config of a parsed config.json.

        Raises:
            ValueError: missing or contradictory fields, or values that change the computation and are not supported;
            all listed.
        """
        if missing := [name for name in REQUIRED if config.get(name) is None]:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        heads, width = config["num_attention_heads"], config["hidden_size"]
        rope_theta, rope_scaling, problems = _rope(config)
        names = {field.name for field in dataclasses.fields(cls)} - {"rope_theta", "rope_scaling", "source"}
        values = {name: config[name] for name in names if config.get(name) is not None}
        values |= {
            "num_key_value_heads": config.get("num_key_value_heads") or heads,
            "head_dim": config.get("head_dim") or width // heads,
            "eos_token_ids": _as_tuple(config.get("eos_token_id")),
        }
        if config.get("head_dim") is None and width % heads:
            problems.append(
                f"hidden_size {width} is not a multiple of num_attention_heads {heads}, and head_dim is not given"
            )
        if heads % values["num_key_value_heads"]:
            problems.append(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {values['num_key_value_heads']}"
            )
        if (activation := config.get("hidden_act", "silu")) != "silu":
            problems.append(f"hidden_act {activation!r} is not supported (supported: 'silu')")
        if problems:
            raise ValueError("config.json:\n  " + "\n  ".join(problems))
        return cls(
            **values, rope_theta=rope_theta, rope_scaling=rope_scaling, source=json.dumps(config, sort_keys=True)
        )

    def to_hf(self) -> dict[str, Any]:
        """The config.json this was made from, every key of it."""
        return json.loads(self.source)


def _as_tuple(value: Any) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def _rope(config: dict[str, Any]) -> tuple[float, RopeScaling, list[str]]:
    """rope_theta, the scaling, and what is wrong with them; transformers 4 and 5 write them in different places."""
    parameters = config.get("rope_parameters") or {}
    scaling = {**(config.get("rope_scaling") or {}), **parameters}
    theta = float(scaling.pop("rope_theta", None) or config.get("rope_theta") or 10000.0)
    rope_type = scaling.pop("rope_type", None) or scaling.get("type") or "default"
    scaling.pop("type", None)
    known = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if rope_type not in known:
        return theta, RopeScaling(), [f"rope_type {rope_type!r} is not supported (supported: {', '.join(known)})"]
    problems = [f"rope_type {rope_type!r} needs {name!r}" for name in known[rope_type] if scaling.get(name) is None]
    problems += [
        f"rope_type {rope_type!r} with {name!r} is not supported"
        for name in sorted(set(scaling) - set(known[rope_type]))
    ]
    values = {name: scaling[name] for name in known[rope_type] if scaling.get(name) is not None}
    return theta, RopeScaling(rope_type=rope_type, **values), problems
