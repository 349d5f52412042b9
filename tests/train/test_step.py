"""The step: PEFT's gradients and weights, accumulation, frozen weights, sharding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from transformers import LlamaForCausalLM

import jlora
from jlora import lora, sharding, tree
from jlora.optim import OptimConfig, make_optimizer, own_optim
from jlora.train.algorithms.sft import sft_loss
from jlora.train.state import create_state, create_states
from jlora.train.step import Objective, Report, make_step, make_steps

CONFIG = jlora.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False)
OPTIM = OptimConfig(learning_rate=1e-2, schedule="constant", max_grad_norm=0.0)


def batch(accumulate=1, rows=4, length=12, seed=0):
    """Rows with padding at the end and about half of the tokens trained."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 257, (rows, length)).astype(np.int32)
    lengths = rng.integers(length // 2, length + 1, (rows, 1))
    inside = np.arange(length) < lengths
    arrays = {
        "tokens": tokens * inside,
        "targets": np.roll(tokens, -1, axis=1),
        "weights": ((np.arange(length) < lengths - 1) & (rng.random((rows, length)) < 0.6)).astype(np.float32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape),
        "segment_ids": inside.astype(np.int32),
    }
    return {name: value.reshape(accumulate, -1, length) for name, value in arrays.items()}


ONE_DEVICE = sharding.MeshConfig()


def prepared(folder, mesh_config=ONE_DEVICE, quant=None, config=CONFIG, remat=True):
    mesh = sharding.make_mesh(mesh_config)
    model, params = jlora.load(folder, quant=quant, mesh=mesh)
    frozen, trainable = lora.split(lora.init(params, config, jax.random.key(1)))
    optimizer = make_optimizer(OPTIM, 10)
    state = create_state(trainable, optimizer, 0, mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_step(sft_loss(model, remat=remat, chunk=8), optimizer, places, dropout=config.lora_dropout > 0)
    return mesh, model, sharding.shard(frozen, mesh), state, step


def run(folder, batches, **settings):
    mesh, _, frozen, state, step = prepared(folder, **settings)
    metrics = []
    for item in batches:
        state, values = step(state, frozen, sharding.put_batch(item, mesh))
        metrics.append({name: float(value) for name, value in values.items()})
    return state, metrics


def close(left, right, tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), left, right)


def test_three_steps_are_pefts(model_folder, tmp_path):
    mesh, _, frozen, state, step = prepared(model_folder)
    jlora.save_adapter(tmp_path / "start", lora.combine(frozen, state.trainable), base=model_folder)
    reference = peft.PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(model_folder), tmp_path / "start", is_trainable=True
    )
    optimizer = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for seed in range(3):
        arrays = batch(seed=seed)
        state, metrics = step(state, frozen, sharding.put_batch(arrays, mesh))
        item = {name: torch.from_numpy(np.array(value[0])) for name, value in arrays.items()}
        logits = reference(input_ids=item["tokens"].long(), attention_mask=item["segment_ids"].long()).logits
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), item["targets"].long(), reduction="none")
        loss = (nll * item["weights"]).sum() / item["weights"].sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1e9)
        optimizer.step()
        assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-4)
        assert float(metrics["grad_norm"]) == pytest.approx(norm.item(), rel=1e-3)
    reference.save_pretrained(tmp_path / "end")
    theirs = lora.split(jlora.load_adapter(lora.combine(frozen, state.trainable), tmp_path / "end"))[1]
    close(state.trainable, theirs, 2e-3)


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_frozen_leaves_are_the_same_bits_after_training(model_folder, quant):
    mesh, _, frozen, state, step = prepared(model_folder, quant=quant)
    before = jax.tree.map(np.array, frozen)
    start = jax.tree.map(np.array, state.trainable)
    for seed in range(2):
        state, _ = step(state, frozen, sharding.put_batch(batch(seed=seed), mesh))
    jax.tree.map(np.testing.assert_array_equal, before, frozen)
    moved = [bool(np.any(a != b)) for a, b in zip(*map(jax.tree.leaves, (start, state.trainable)), strict=True)]
    assert all(moved)


def test_accumulation_is_the_large_batch(model_folder):
    whole, whole_metrics = run(model_folder, [batch(1)])
    parts, parts_metrics = run(model_folder, [batch(4)])
    close(whole.trainable, parts.trainable, 5e-5)  # Adam lifts the rounding of the smallest gradients
    assert whole_metrics[0] == pytest.approx(parts_metrics[0], rel=5e-5)


def test_remat_changes_nothing_but_rounding(model_folder):
    close(
        run(model_folder, [batch()], remat=True)[0].trainable,
        run(model_folder, [batch()], remat=False)[0].trainable,
        1e-5,
    )


@pytest.mark.parametrize("quant", [pytest.param(None, marks=pytest.mark.slow), "nf4"])
@pytest.mark.parametrize("mesh", [dict(fsdp=4, tensor=2), dict(data=2, fsdp=2, sequence=2)], ids=str)
def test_a_mesh_changes_nothing_but_rounding(model_folder, quant, mesh):
    batches = [batch(seed=seed) for seed in range(2)]
    one, one_metrics = run(model_folder, batches, quant=quant)
    many, many_metrics = run(model_folder, batches, quant=quant, mesh_config=sharding.MeshConfig(**mesh))
    for a, b in zip(one_metrics, many_metrics, strict=True):
        assert a == pytest.approx(b, rel=5e-5)
    # Adam's first steps divide a gradient by its own size, which lifts the rounding of the smallest ones
    differences = jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b), one.trainable, many.trainable))
    assert max(d.max() for d in differences) < 0.1 * OPTIM.learning_rate
    assert max(d.mean() for d in differences) < 1e-5


def test_everything_stays_where_it_was_put_and_compiles_once(model_folder):
    mesh, _, frozen, state, step = prepared(model_folder, sharding.MeshConfig(fsdp=4, tensor=2))
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    split = [place for place in jax.tree.leaves(places.moments) if not place.is_fully_replicated]
    assert len(split) == 2 * sum(not p.is_fully_replicated for p in jax.tree.leaves(places.trainable)) > 0
    for seed in range(3):
        state, _ = step(state, frozen, sharding.put_batch(batch(seed=seed), mesh))
    after = jax.tree.map(lambda leaf: leaf.sharding, state)
    same = jax.tree.map(lambda a, b, leaf: a.is_equivalent_to(b, leaf.ndim), places, after, state)
    assert all(jax.tree.leaves(same))
    assert step._cache_size() == 1


def test_dropout_differs_by_step_and_not_by_run(model_folder):
    config = jlora.LoraConfig(r=4, lora_dropout=0.5, init_lora_weights=False)
    batches = [batch(), batch()]
    first, second = (run(model_folder, batches, config=config)[1] for _ in range(2))
    assert first == second
    plain = run(model_folder, batches[:1])[1]
    assert abs(first[0]["loss"] - plain[0]["loss"]) > 1e-3


def test_moments_exist_for_adapters_alone(model_folder):
    _, _, _, state, _ = prepared(model_folder, quant="nf4")
    assert tree.nbytes(state.moments) < 2.1 * tree.nbytes(state.trainable)


# ---------------------------------------------------------------- laws of the step, on two numbers a leaf


def toy_objective():
    """The weighted mean of (a · x + b)², and the key that each micro-batch was given."""

    def loss(trainable, frozen, batch, totals, key):
        y = trainable["m"]["lora_a"][0] * batch["x"] + trainable["m"]["lora_b"][0] + frozen["m"]["bias"][0]
        words = jnp.zeros(2, jnp.uint32) if key is None else jax.random.key_data(key)
        part = jnp.sum(batch["weights"] * y**2) / totals["weight"]
        return part, Report({"weight": jnp.sum(batch["weights"])}, {"keys": words})

    return Objective(loss, lambda batch: {"weight": jnp.sum(batch["weights"])})


TOY_FROZEN = {"m": {"bias": jnp.ones(1)}}
TOY_OPTIM = OptimConfig(learning_rate=0.1, schedule="constant", max_grad_norm=0.5)


def toy_trainable(first=1.0):
    return {"m": {"lora_a": jnp.float32([first]), "lora_b": jnp.float32([-0.5])}}


def toy_batch(micro, step=0, shape=(3,)):
    rng = np.random.default_rng(step)
    x, weights = rng.normal(size=(6, *shape)), rng.random((6, *shape))
    return {name: jnp.float32(v).reshape(micro, -1, *shape[1:]) for name, v in (("x", x), ("weights", weights))}


def toy_run(micro, *, dropout=False, steps=3, seed=0, optim=TOY_OPTIM, first=1.0):
    optimizer = make_optimizer(optim, 10)
    state = create_state(toy_trainable(first), optimizer, seed, sharding.make_mesh(ONE_DEVICE))
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    step, seen = make_step(toy_objective(), optimizer, places, dropout=dropout), []
    for number in range(steps):
        state, metrics = step(state, TOY_FROZEN, toy_batch(micro, number))
        seen.append(jax.device_get(metrics))
        assert int(state.step) == number + 1
    return state, seen


def test_toy_steps_are_adamw_on_the_mean_of_the_whole_batch():
    """By hand in NumPy: the loss, the gradient's norm before clipping, AdamW with its moments, for any cut."""
    a, b, moments = np.array([1.0]), np.array([-0.5]), np.zeros((2, 2))
    expected = []
    for number in range(3):
        x, weights = (np.asarray(v, np.float64).ravel() for v in toy_batch(1, number).values())
        y, total = a * x + b + 1, weights.sum()
        grad = np.array([(weights * 2 * y * x).sum(), (weights * 2 * y).sum()]) / total
        norm = np.linalg.norm(grad)
        expected.append(((weights * y**2).sum() / total, norm, total))
        clipped = grad * min(1, 0.5 / norm)
        moments = np.array([0.9 * moments[0] + 0.1 * clipped, 0.999 * moments[1] + 0.001 * clipped**2])
        steps = number + 1
        update = 0.1 * (moments[0] / (1 - 0.9**steps)) / (np.sqrt(moments[1] / (1 - 0.999**steps)) + 1e-8)
        a, b = a - update[0], b - update[1]
    for micro in (1, 2, 6):
        state, seen = toy_run(micro)
        found = [(float(m["loss"]), float(m["grad_norm"]), float(m["weight"])) for m in seen]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        np.testing.assert_allclose(state.trainable["m"]["lora_a"], a, rtol=1e-5)
        np.testing.assert_allclose(state.trainable["m"]["lora_b"], b, rtol=1e-5)


def test_toy_every_micro_batch_of_every_step_has_a_key_of_its_own():
    keys = [toy_run(3, dropout=True, seed=seed)[1] for seed in (0, 1, 0)]
    keys = [[tuple(words) for metrics in run for words in metrics["keys"].tolist()] for run in keys]
    assert len(set(keys[0] + keys[1])) == 2 * 9 and keys[0] == keys[2]
    assert not np.any([metrics["keys"] for metrics in toy_run(3)[1]])


def test_toy_adapters_side_by_side_are_what_they_are_alone():
    seeds, firsts, micro = (3, 8), (1.0, -2.0), 2
    other = dict(learning_rate=0.3, schedule="linear", warmup_steps=2, weight_decay=0.2, loraplus_lr_ratio=4.0)
    optims = (TOY_OPTIM, dataclasses.replace(TOY_OPTIM, **other))
    own = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(own_optim(optim, 10) for optim in optims))
    optimizer = functools.partial(make_optimizer, TOY_OPTIM, 10)
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(toy_trainable, firsts))
    state = create_states(both, optimizer(own), seeds, sharding.make_mesh(ONE_DEVICE))
    step = make_steps(toy_objective(), optimizer, jax.tree.map(lambda leaf: leaf.sharding, state), dropout=True)
    frozen = {"base": TOY_FROZEN, "settings": {}, "optim": own}
    seen = []
    for number in range(3):
        batch = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf], axis=1), toy_batch(micro, number))
        state, metrics = step(state, frozen, batch)
        seen.append(jax.device_get(metrics))
        assert int(state.step) == number + 1
    for place, (optim, seed, first) in enumerate(zip(optims, seeds, firsts, strict=True)):
        alone, expected = toy_run(micro, dropout=True, seed=seed, optim=optim, first=first)
        close(jax.tree.map(lambda leaf, place=place: leaf[place], state.trainable), alone.trainable, 1e-6)
        for ours, theirs in zip(seen, expected, strict=True):
            assert ours["loss"][place] == pytest.approx(theirs["loss"], rel=1e-6)
            np.testing.assert_array_equal(ours["keys"][place], theirs["keys"])
