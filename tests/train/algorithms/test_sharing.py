"""Answers behind one copy of their prompt: losses and gradients are those of answers that each have their own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from jlora import data, lora, sharding, tree
from jlora.data import Example, Item
from jlora.generate import Completion
from jlora.models import build
from jlora.train import resolve
from jlora.train.algorithms import layout, rollout
from jlora.train.algorithms.dpo import DPOConfig, dpo_loss
from jlora.train.algorithms.grpo import grpo_loss
from jlora.train.algorithms.reward_model import RewardConfig, reward_loss
from jlora.train.rewards.judging import RewardTable

MODEL = build(
    transformers.Gemma2Config(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        sliding_window=6,
        query_pre_attn_scalar=12,
        initializer_range=0.15,
    ).to_dict()
)


@pytest.fixture(scope="module")
def halves():
    """(frozen, trainable) with adapters that do something."""

    @jax.jit
    def make():
        params = lora.init(
            jax.jit(MODEL.random_params)(jax.random.key(0)),
            lora.LoraConfig(r=3, target_modules="all-linear"),
            jax.random.key(1),
        )
        return tree.map_with_path(lambda path, leaf: leaf + 0.1 if "lora_b" in path else leaf, params)

    return lora.split(make())


def answers(groups, sides):
    """Items of `sides` documents, of which so many in turn have the same prompt."""
    generator = np.random.Generator(np.random.PCG64(0))
    items = []
    for size in groups:
        prompt = generator.integers(1, 101, generator.integers(1, 14))
        for _ in range(size):
            documents = [
                np.concatenate([prompt, generator.integers(1, 101, n)]) for n in generator.integers(1, 9, sides)
            ]
            examples = [Example(d.astype(np.int32), np.arange(len(d)) >= len(prompt)) for d in documents]
            items.append(Item(tuple(examples), {"index": float(len(items))}))
    return items


def evaluated(objective, halves, batch):
    """(the loss over all micro-batches, its gradients, the values of items by their index)."""
    frozen, trainable = halves
    constants = {"policy": frozen, "reference": {}}
    batch = jax.tree.map(jnp.asarray, batch)
    totals = objective.totals(batch)

    @jax.jit
    def one(trainable, micro):
        def loss(trainable):
            return objective.loss(trainable, constants, micro, totals, None)

        return jax.value_and_grad(loss, has_aux=True)(trainable)

    value, grads, of_items = 0.0, None, {}
    for number in range(len(batch["tokens"])):
        micro = {name: leaf[number] for name, leaf in batch.items()}
        (part, report), found = one(trainable, micro)
        value += float(part)
        grads = found if grads is None else jax.tree.map(np.add, grads, found)
        for name, values in report.items.items():
            if values.shape == micro["items"].shape:
                for slot in np.flatnonzero(micro["items"]):
                    of_items[name, int(micro["index"][slot])] = float(values[slot])
    return value, grads, of_items


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected[1]))
    for left, right in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5 * scale)
    assert found[2] == pytest.approx(expected[2], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("packing", [True, False])
def test_pairs(packing, halves):
    items = answers([1] * 6, sides=2)
    found = []
    for share in (True, False):
        settings = dict(seq_len=24, batch_size=6, packing=packing, bucket=8, epochs=1, share=share)
        [step] = data.plan_items(items, **settings)
        found.append(
            evaluated(
                dpo_loss(MODEL, DPOConfig(loss_type=("ipo", "sft")), remat=False),
                halves,
                data.collate_items(items, step),
            )
        )
    assert_same(*found)


def test_a_reward_model_that_still_writes(halves):
    """Its loss is the Bradley-Terry loss and so many times DPO's term of the chosen answers, gradients too."""
    items = answers([1] * 5, sides=2)
    [step] = data.plan_items(items, seq_len=24, batch_size=5, packing=True, bucket=8, epochs=1, share=True)
    batch = data.collate_items(items, step)
    halves = lora.split(MODEL.add_score(lora.combine(*halves)))
    apart = [
        evaluated(objective, halves, batch)
        for objective in (
            reward_loss(MODEL, RewardConfig(center_rewards_coefficient=0.1), remat=False),
            dpo_loss(MODEL, DPOConfig(loss_type=("sft",)), remat=False),
        )
    ]
    settings = RewardConfig(center_rewards_coefficient=0.1, sft_coefficient=0.7)
    together = evaluated(reward_loss(MODEL, settings, remat=False), halves, batch)
    assert together[0] == pytest.approx(apart[0][0] + 0.7 * apart[1][0], rel=1e-5)
    for found, reward, sft in zip(*(jax.tree.leaves(part[1]) for part in (together, *apart)), strict=True):
        np.testing.assert_allclose(found, reward + 0.7 * sft, atol=1e-5 * np.abs(found).max())
    assert apart[1][0] > 0.1


@pytest.mark.parametrize("packing", [True, False])
def test_groups(packing, halves):
    items = answers([4] * 4, sides=1)
    prompts = [number // 4 for number in range(16)]
    completions = [
        Completion(d.tokens[d.trained], np.full(d.trained.sum(), -4.0, np.float32), True)
        for item in items
        for d in item.documents
    ]
    table = RewardTable(("r",), np.zeros((16, 1), np.float32), (0,), {}, {})
    rollouts = rollout.Rollouts(prompts, completions, [""] * 16, items, table, np.zeros(16, np.float32), 0)
    config = resolve(
        {
            "algorithm": "grpo",
            "model": {"path": "m"},
            "data": {"path": "d", "bucket": 8, "packing": packing},
            "train": {"steps": 1, "batch_size": 8, "grad_accum": 2, "seq_len": 24, "remat": False},
            "rollout": {"rewards": ("r.py",), "num_generations": 4, "max_completion_length": 9},
            "grpo": {"beta": 0.1, "loss_type": "grpo"},
        }
    )
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1))
    found, read = [], []
    for share in (True, False):
        chosen = dataclasses.replace(config, data=dataclasses.replace(config.data, share_prompts=share))
        batch = layout.lay_out(rollouts, chosen, mesh, 1, (0,))
        batch["sampler_log_probs"] = layout.to_layout(batch, [c.log_probs for c in completions])
        batch["advantages"] = layout.spread(batch, np.sin(np.arange(16)))
        read.append(int((batch["segment_ids"] > 0).sum()))
        found.append(evaluated(grpo_loss(MODEL, chosen), halves, batch))
    assert read[0] < 0.9 * read[1]
    assert_same(*found)
