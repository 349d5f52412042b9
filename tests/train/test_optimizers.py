"""Every optimizer in the step: on a mesh, accumulated, resumed, side by side, skipped."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import checkpoint, sharding
from jlora.errors import UserError
from jlora.optim import OptimConfig, make_optimizer, own_optim
from jlora.optim.rules import OPTIMIZERS
from jlora.train import resolve, run
from jlora.train.reporting.metrics import read_metrics
from jlora.train.state import create_state, create_states
from jlora.train.step import Objective, Report, make_step, make_steps

RATE = 1e-2
SHAPES = {"lora_a": (2, 512, 12), "lora_b": (2, 12, 640), "lora_magnitude": (2, 640)}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def settings(name, rate=1.0):
    return OptimConfig(name=name, learning_rate=RATE * rate, warmup_ratio=0.1, weight_decay=0.1)


def weights(seed=0):
    rng = np.random.default_rng(seed)
    leaves = {name: jnp.asarray(rng.normal(size=shape) / 10, jnp.float32) for name, shape in SHAPES.items()}
    return {"layers": {"self_attn": {"q_proj": leaves}}}


def objective():
    """The mean squared distance of both layers' outputs from targets."""

    def loss(trainable, frozen, batch, totals, key):
        module = trainable["layers"]["self_attn"]["q_proj"]
        y = (
            jnp.einsum("bd,ldr,lrn->bln", batch["x"], module["lora_a"], module["lora_b"])
            * module["lora_magnitude"][None]
        )
        return jnp.sum((y - batch["y"][:, None]) ** 2) / totals["rows"], Report({})

    return Objective(loss, lambda batch: {"rows": jnp.float32(batch["x"].shape[0] * batch["x"].shape[1])})


def batch(micro, seed):
    rng = np.random.default_rng(seed)
    arrays = {"x": rng.normal(size=(4, 512)), "y": rng.normal(size=(4, 640))}
    return {name: jnp.asarray(value, jnp.float32).reshape(micro, -1, value.shape[1]) for name, value in arrays.items()}


def begun(name, mesh=sharding.MeshConfig(), seed=0, rate=1.0, skip=False):  # noqa: B008 (frozen)
    """(state, step) of one adapter."""
    optimizer = make_optimizer(settings(name, rate), 10)
    state = create_state(weights(seed), optimizer, 0, sharding.make_mesh(mesh))
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    return state, make_step(objective(), optimizer, places, skip=skip)


def advanced(state, step, numbers, micro=1):
    for number in numbers:
        state, _ = step(state, {}, batch(micro, number))
    return state


def close(left, right):
    """Equal but for rounding, which may turn a sign of Lion's or a code of 8 bits."""
    for one, other in zip(*map(jax.tree.leaves, (left, right)), strict=True):
        assert np.abs(np.asarray(one) - np.asarray(other)).mean() < 1e-3 * RATE


@each_optimizer
def test_a_mesh_and_accumulation_change_nothing_but_rounding(name):
    one = advanced(*begun(name), range(3))
    state, step = begun(name, sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    state = advanced(state, step, range(3), micro=2)
    close(state.trainable, one.trainable)
    same = jax.tree.map(lambda leaf, place: leaf.sharding.is_equivalent_to(place, leaf.ndim), state, places)
    assert all(jax.tree.leaves(same)) and step._cache_size() == 1
    whole = [leaf for leaf in jax.tree.leaves(state.moments) if leaf.ndim == 3 and leaf.sharding.is_fully_replicated]
    assert sum(leaf.nbytes for leaf in whole) < 0.02 * sum(leaf.nbytes for leaf in jax.tree.leaves(state.trainable))


@each_optimizer
def test_a_resume_is_the_same_run_to_the_bit(name, tmp_path):
    state, step = begun(name)
    state = advanced(state, step, range(2))
    saved = checkpoint.Checkpoints(tmp_path, keep=1, manifest={}, fixed={"m": {"bias": jnp.ones(1)}})
    saved.save(2, state, {})
    saved.close()
    whole = advanced(state, step, range(2, 4))
    again = checkpoint.Checkpoints(tmp_path, keep=1, manifest={}, fixed={"m": {"bias": jnp.ones(1)}})
    restored, _ = again.restore(begun(name)[0])
    again.close()
    jax.tree.map(np.testing.assert_array_equal, advanced(restored, step, range(2, 4)), whole)


@each_optimizer
def test_adapters_side_by_side_are_what_they_are_alone(name):
    rates = (1.0, 0.25)
    optimizer = functools.partial(make_optimizer, settings(name), 10)
    own = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(own_optim(settings(name, rate), 10) for rate in rates))
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), weights(0), weights(1))
    state = create_states(both, optimizer(own), (0, 0), sharding.make_mesh(sharding.MeshConfig()))
    step = make_steps(objective(), optimizer, jax.tree.map(lambda leaf: leaf.sharding, state))
    frozen = {"base": {}, "settings": {}, "optim": own}
    for number in range(3):
        state, _ = step(state, frozen, jax.tree.map(lambda leaf: jnp.stack([leaf, leaf], axis=1), batch(1, number)))
    for place, rate in enumerate(rates):
        alone = advanced(*begun(name, seed=place, rate=rate), range(3))
        close(jax.tree.map(lambda leaf, place=place: leaf[place], state.trainable), alone.trainable)


@each_optimizer
def test_a_skipped_step_leaves_weights_and_moments_alone(name):
    state, step = begun(name, skip=True)
    state = advanced(state, step, range(2))
    before = jax.tree.map(np.array, state)
    spoiled = jax.tree.map(lambda leaf: leaf * np.nan, batch(1, 2))
    state, metrics = step(state, {}, spoiled)
    assert not metrics["finite"]
    jax.tree.map(np.testing.assert_array_equal, state.trainable, before.trainable)
    pairs = zip(*map(jax.tree.leaves, (state.moments, before.moments)), strict=True)
    assert all(np.array_equal(one, other) for one, other in pairs if one.ndim)
    assert np.isfinite(step(state, {}, batch(1, 3))[1]["loss"])


@pytest.mark.slow
def test_a_run_evaluates_and_exports_the_average(make_llama, tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{i} plus {i} is ", "completion": f"{2 * i}."} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = {"steps": 2, "batch_size": 2, "seq_len": 32, "eval_every": 2, "eval_on_start": True}
    values = {
        "model": {"path": make_llama(hidden_size=24, intermediate_size=40, num_attention_heads=3)},
        "data": {"path": str(path), "eval_path": str(path)},
        "lora": {"r": 2, "target_modules": ["q_proj"]},
        "optim": {"name": "schedule_free_adamw", "learning_rate": 0.05},
        "train": train,
    }
    workdir = tmp_path / "run"
    run(resolve(values), workdir)
    continued = {group: value for group, value in values.items() if group != "lora"}
    continued["model"] = values["model"] | {"adapter": str(workdir / "adapter")}
    run(resolve(continued | {"train": train | {"steps": 1}}), tmp_path / "next")
    assert read_metrics(tmp_path / "next")[0]["eval_loss"] == pytest.approx(read_metrics(workdir)[-1]["eval_loss"])
    with pytest.raises(UserError, match=r"optim\.name: the run has 'schedule_free_adamw', given 'adamw'"):
        run(resolve(values | {"optim": {"learning_rate": 0.05}}), workdir)
