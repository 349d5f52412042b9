"""How much of its devices a run used: peak memory and the share of their arithmetic."""

import dataclasses
import resource
import sys
from collections.abc import Sequence
from typing import Any

import jax

from jlora import devices, tree
from jlora.errors import size_of
from jlora.lora.kinds import multiplies
from jlora.lora.sites import MAIN, is_expert
from jlora.models import ModelConfig
from jlora.models.mixers import MIXERS
from jlora.types import Params


@dataclasses.dataclass(frozen=True)
class Usage:
    """The usage of one run.

    Attributes:
        tokens_per_second: over all devices.
        peak_bytes: the most memory that a device held; on CPU, how much the process's peak has grown.
        of_process: whether `peak_bytes` is the process's.
        mfu: the model's FLOPs as a share of the devices' peak; None if either is not known.
    """

    tokens_per_second: float
    peak_bytes: int | None
    of_process: bool = False
    mfu: float | None = None

    def numbers(self) -> dict[str, float]:
        """Those of `tokens_per_second`, `peak_bytes` and `mfu` that are known, for a log."""
        return {
            name: value
            for name in ("tokens_per_second", "peak_bytes", "mfu")
            if (value := getattr(self, name)) is not None
        }

    def __str__(self) -> str:
        parts = [f"{self.tokens_per_second:,.0f} tokens/s"]
        if self.peak_bytes is not None:
            where = "of the process" if self.of_process else "a device"
            parts.append(f"peak memory {size_of(self.peak_bytes)} {where}")
        if self.mfu is not None:
            parts.append(f"MFU {self.mfu:.1%}")
        return ", ".join(parts)


def summary(
    tokens: int,
    seconds: int | float,
    flops_per_token: int | float | None = None,
    *,
    used: Sequence[Any] | None = None,
    grown_from: int = 0,
) -> Usage:
    """The usage of a run that took `seconds` for `tokens`.

    Args:
        seconds: should exclude compilation, so that tokens per second measure the steps.
        flops_per_token: see the function of that name.
        used: the `jax.Device`s of the run's mesh; default: the first device.
        grown_from: `process_peak()` before the run.
    """
    used = list(used) if used is not None else jax.devices()[:1]
    local = [device for device in used if device.process_index == jax.process_index()] or used[:1]
    peaks = [stats["peak_bytes_in_use"] for device in local if (stats := device.memory_stats())]
    speed = tokens / seconds if seconds > 0 else 0.0
    device = devices.known(used[0].device_kind)
    mfu = None
    if flops_per_token and device is not None and device.flops:
        mfu = speed * flops_per_token / (device.flops * len(used))
    if peaks:
        return Usage(speed, max(peaks), mfu=mfu)
    return Usage(speed, max(0, process_peak() - grown_from), of_process=True, mfu=mfu)


def flops_per_token(config: ModelConfig, frozen: Params, trainable: Params, seq_len: int) -> float:
    """A step's FLOPs per token of a row of `seq_len` tokens, as MFU counts them (Chowdhery et al. 2022, PaLM).

    These are products with weights and in attention, but not recomputation by remat, reference policies or rollouts.

    A frozen weight takes part in two products, in the forward pass and for the gradient of its input; a trained one in
    three. All of attention's scores are counted, although half of them are masked; of recurrences, every reading and
    writing of the state (`jlora.models.mixers.Mixer.products`).
    """

    def multiplied(params: Params) -> float:
        count = 0.0
        for path, leaf in tree.flatten(params).items():
            module, _, name = path.rpartition("/")
            is_head = module == config.names.embedding and config.tie_word_embeddings
            looked_up = name == "embedding" and not is_head
            if looked_up or leaf.ndim < 2 or not (multiplies(name) if tree.is_added(name) else name in MAIN):
                continue
            share = config.experts.top_k / config.experts.count if config.experts and is_expert(path) else 1.0
            count += share * leaf.size
        return count

    mixed = sum(MIXERS[layer.mixer].products(config, layer, seq_len) for layer in config.layers)
    return 4 * multiplied(frozen) + 6 * (multiplied(trainable) + mixed)


def process_peak() -> int:
    """The peak memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
