"""Rollouts as arrays: items laid out in rows, and numbers per item or token moved to that layout and back."""

import functools
import itertools
from collections.abc import Sequence

import jax
import numpy as np

from jlora import data, sharding
from jlora.train.algorithms.rollout import Rollouts
from jlora.train.rewards.judging import RewardTable
from jlora.train.settings import SharedConfig


def lay_out(
    rollouts: Rollouts, config: SharedConfig, mesh: jax.sharding.Mesh, parts: int, seed: tuple[int, ...]
) -> data.Batch:
    """The items as arrays [A, B, T]: A a multiple of `parts`, B at most `train.batch_size`, rows spread evenly.

    Completions too short to fill one row per part are laid out one per row.

    Args:
        seed: numbers that determine the order of the rows. Rows are planned by length, and shuffled so that no part,
            which may be a step of its own, holds only the longest ones.
    """
    train, share = config.train, config.data.share_prompts
    plan = functools.partial(
        data.plan_items, rollouts.items, seq_len=train.seq_len, batch_size=1, bucket=config.data.bucket, shuffle=False
    )
    steps = plan(epochs=1, packing=config.data.packing, share=share, prompts=rollouts.numbers)
    if len(steps) < parts:
        share = False
        steps = plan(epochs=1, packing=False)
    order = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed))).permutation(len(steps))
    steps = [steps[place] for place in order]
    micro_batches = parts * -(-len(steps) // (parts * train.batch_size))
    height = min(train.batch_size, _height(-(-len(steps) // micro_batches), sharding.row_ways(mesh)))
    edges = [len(steps) * i // micro_batches for i in range(micro_batches + 1)]
    rows: list[tuple[int, ...]] = []
    groups: list[tuple[int, ...]] = []
    for start, end in itertools.pairwise(edges):
        padding = [()] * (height - (end - start))
        rows += [step.rows[0] for step in steps[start:end]] + padding
        groups += [step.groups[0] if step.groups else () for step in steps[start:end]] + padding
    step = data.Step(tuple(rows), max(step.length for step in steps), tuple(groups) if share else None)
    return data.collate_items(rollouts.items, step, micro_batches)


def fullest(config: SharedConfig, mesh: jax.sharding.Mesh, parts: int) -> data.Batch:
    """A rollout laid out by `lay_out` that needs as much memory as any.

    Its prompts and completions have the maximum length, with the sampler's log-probabilities.
    """
    train, settings = config.train, config.rollout
    count = train.batch_size * train.grad_accum * parts
    document = data.filled(train.seq_len, train.seq_len - settings.max_completion_length)
    rollouts = Rollouts(
        numbers=[place // settings.num_generations for place in range(count)],
        completions=[],
        texts=[],
        items=[data.Item((document,), {"index": float(place)}) for place in range(count)],
        table=RewardTable((), np.zeros((count, 0), np.float32), (), {}, {}),
        rewards=np.zeros(count, np.float32),
        digest=0,
    )
    batch = lay_out(rollouts, config, mesh, parts, (0,))
    return batch | {"sampler_log_probs": np.zeros_like(batch["weights"])}


def _height(rows: int, ways: int) -> int:
    """The rows of a micro-batch on a mesh that splits them `ways` ways.

    Up to a quarter more than needed, so that rollouts of different sizes have few shapes.
    """
    rows = -(-rows // ways)
    grain = 1 << max(0, rows.bit_length() - 3)
    return ways * -(-rows // grain) * grain


def to_layout(batch: data.Batch, values: Sequence[np.ndarray]) -> np.ndarray:
    """[A, B, T] with each item's per-token values at its trained tokens, 0 elsewhere."""
    laid = np.zeros(batch["weights"].shape, np.float32)
    for micro, slots in enumerate(batch["items"]):
        for slot in np.flatnonzero(slots):
            places = (batch["documents"][micro] == slot) & (batch["weights"][micro] > 0)
            found = values[int(batch["index"][micro, slot])]
            laid[micro][places] = found[: int(places.sum())]
    return laid


def by_item(batch: data.Batch, values: np.ndarray) -> np.ndarray:
    """The sums [N] of the values [A, B, T] over each item's tokens, in the items' order."""
    sums = np.zeros(int(batch["items"].sum()), np.float32)
    for micro, slots in enumerate(batch["items"]):
        for slot in np.flatnonzero(slots):
            sums[int(batch["index"][micro, slot])] = values[micro][batch["documents"][micro] == slot].sum()
    return sums


def spread(batch: data.Batch, values: np.ndarray) -> np.ndarray:
    """[A, B, T] with each item's value at its trained tokens, 0 elsewhere."""
    lengths = by_item(batch, batch["weights"]).astype(int)
    return to_layout(batch, [np.full(length, value, np.float32) for length, value in zip(lengths, values, strict=True)])


def parts(batch: data.Batch, count: int) -> list[data.Batch]:
    """The batch of a rollout, split into the batches of `count` steps."""
    size = len(batch["weights"]) // count
    return [{name: leaf[i * size : (i + 1) * size] for name, leaf in batch.items()} for i in range(count)]
