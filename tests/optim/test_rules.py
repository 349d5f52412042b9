"""Every optimizer's updates against PyTorch's, transformers', bitsandbytes' or its paper's, in stacks too."""

import bitsandbytes as bnb
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from jlora import tree
from jlora.optim import OptimConfig, blockwise, gradient_point, make_optimizer
from jlora.optim.blockwise import nearest_codes
from jlora.optim.rules import OPTIMIZERS

RATE, DECAY = 0.01, 0.1
RNG = np.random.default_rng(0)
# Two layers of A and B with more than 4096 elements each, and one with a rest of a block.
START = {
    "lora_a": RNG.normal(size=(2, 300, 16), scale=0.02).astype(np.float32),
    "lora_b": RNG.normal(size=(2, 16, 512), scale=0.02).astype(np.float32),
}
GRADS = [{name: RNG.normal(size=value.shape).astype(np.float32) for name, value in START.items()} for _ in range(3)]


def settings(name, **changed):
    return OptimConfig(
        **dict(name=name, learning_rate=RATE, schedule="constant", weight_decay=DECAY, max_grad_norm=0.0) | changed
    )


def ours(config, steps, start=START, grads=None):
    """The weights after each step, and the last state."""
    optimizer = make_optimizer(config, 10)
    params = {"layers": {"proj": jax.tree.map(jnp.asarray, start)}}
    state, seen = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for number in range(steps):
        updates, state = update({"layers": {"proj": (grads or GRADS)[number]}}, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(jax.tree.map(np.asarray, params["layers"]["proj"]))
    return seen, state


def theirs(make, steps):
    """The weights after each step of a PyTorch optimizer on each layer's matrices, transposed as PEFT holds them."""
    weights = {
        name: [torch.nn.Parameter(torch.tensor(layer.T.copy())) for layer in stack] for name, stack in START.items()
    }
    optimizer, seen = make([weight for layers in weights.values() for weight in layers]), []
    for number in range(steps):
        for name, layers in weights.items():
            for weight, grad in zip(layers, GRADS[number][name], strict=True):
                weight.grad = torch.tensor(grad.T.copy())
        optimizer.step()
        seen.append(
            {name: np.stack([layer.detach().numpy().T for layer in layers]) for name, layers in weights.items()}
        )
    return seen


@pytest.fixture
def noted(parity):
    """noted(optimizer, ours, theirs): the same updates, and their largest relative difference in the table."""

    def compare(name, left, right):
        left, right = (
            [{leaf: (one[leaf] - START[leaf]) / RATE for leaf in START} for one in seen] for seen in (left, right)
        )
        same(left, right)
        pairs = [(one[leaf], other[leaf]) for one, other in zip(left, right, strict=True) for leaf in START]
        parity(
            "optimizer", name, "updates", max(np.abs(one - other).max() / np.abs(other).max() for one, other in pairs)
        )

    return compare


def same(left, right, tolerance=1e-5):
    for one, other in zip(left, right, strict=True):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), dict(one), dict(other)
        )


def test_adafactor_is_transformers(noted):
    options = dict(lr=RATE, scale_parameter=False, relative_step=False, warmup_init=False, weight_decay=DECAY)
    noted("adafactor", ours(settings("adafactor"), 3)[0], theirs(lambda p: transformers.Adafactor(p, **options), 3))


def test_lion_is_bitsandbytes(noted):
    noted(
        "lion", ours(settings("lion"), 3)[0], theirs(lambda p: bnb.optim.Lion32bit(p, lr=RATE, weight_decay=DECAY), 3)
    )


def test_muon_is_pytorchs_in_float32(monkeypatch, noted):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    options = dict(lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    noted("muon", ours(settings("muon"), 3)[0], theirs(lambda p: torch.optim.Muon(p, **options), 3))


def test_muon_leaves_vectors_and_rows_of_tokens_to_adamw():
    shapes = {
        "layers/proj/trained_bias": (2, 5),
        "layers/proj/lora_magnitude": (2, 5),
        "norm/trained_scale": (5,),
        "embed_tokens/lora_a": (7, 3),
        "embed_tokens/lora_tokens": (2, 5),
        "lm_head/trained_kernel": (5, 7),
        "score/trained_kernel": (5, 1),
        "layers/mlp/experts/proj/lora_a": (2, 3, 5, 4),
        "layers/proj/lora_b": (2, 4, 5),
    }
    grads = tree.unflatten({path: jnp.asarray(RNG.normal(size=shape), jnp.float32) for path, shape in shapes.items()})
    found = []
    for name in ("muon", "adamw"):
        optimizer = make_optimizer(settings(name), 10)
        found.append(tree.flatten(optimizer.update(grads, optimizer.init(grads), grads)[0]))
    differ = [path for path in shapes if not np.array_equal(found[0][path], found[1][path])]
    assert differ == ["layers/mlp/experts/proj/lora_a", "layers/proj/lora_b"]
    alone = make_optimizer(settings("muon"), 10)
    one = {"proj": {"lora_a": tree.flatten(grads)[differ[0]][1, 2]}}
    expected = alone.update(one, alone.init(one), one)[0]["proj"]["lora_a"]
    np.testing.assert_allclose(found[0][differ[0]][1, 2], expected, rtol=1e-5)


def averages(steps, grads):
    """Schedule-free AdamW in float64, from the paper: gradients do not depend on the weights here."""
    x, z, second, sums, seen = (dict(START), dict(START), dict.fromkeys(START, 0.0), 0.0, [])
    x, z = ({name: value.astype(np.float64) for name, value in one.items()} for one in (x, z))
    for number in range(steps):
        rate = RATE * min(1.0, number / 2)
        sums += rate**2
        for name, grad in grads[number].items():
            y = 0.1 * z[name] + 0.9 * x[name]
            second[name] = 0.999 * second[name] + 0.001 * grad.astype(np.float64) ** 2
            scaled = grad / (np.sqrt(second[name] / (1 - 0.999 ** (number + 1))) + 1e-8)
            z[name] = z[name] - rate * (scaled + DECAY * y)
            x[name] = x[name] + (rate**2 / sums if sums else 0.0) * (z[name] - x[name])
        seen.append(dict(x))
    return seen, z


def test_adamw_is_pytorchs(noted):
    options = dict(lr=RATE, weight_decay=DECAY)
    noted("adamw", ours(settings("adamw"), 3)[0], theirs(lambda p: torch.optim.AdamW(p, **options), 3))


def test_schedule_free_adamw_is_its_papers(noted):
    found, state = ours(settings("schedule_free_adamw", warmup_steps=2), 3)
    expected, newest = averages(3, GRADS)
    same(found[:1], [START])  # the first step of a warm-up has the rate zero
    noted("schedule_free_adamw", found[1:], expected[1:])
    point = gradient_point({"layers": {"proj": found[-1]}}, state)["layers"]["proj"]
    same([point], [{name: 0.1 * newest[name] + 0.9 * expected[-1][name] for name in START}])


def test_schedule_free_adamw_finds_the_minimum_at_the_average():
    config = OptimConfig(name="schedule_free_adamw", learning_rate=0.05, warmup_ratio=0.05)
    optimizer = make_optimizer(config, 200)
    params = {"proj": {"lora_a": jnp.zeros((3, 2))}}
    goal = jnp.arange(6.0).reshape(3, 2)

    def body(carry, _):
        params, state = carry
        grads = jax.tree.map(lambda w: w - goal, gradient_point(params, state))
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(body, (params, optimizer.init(params)), None, length=600)
    np.testing.assert_allclose(params["proj"]["lora_a"], goal, atol=0.05)


def adam_8bit(steps):
    """Adam with 8-bit moments from its paper, in NumPy: the nearest of the map's values in blocks of 256."""
    maps = [bnb.functional.create_dynamic_map(signed=signed).numpy().astype(np.float64) for signed in (True, False)]

    def rounded(values, codes):
        """Along the last axis."""
        found = np.empty_like(values)
        for begin in range(0, values.shape[-1], 256):
            part = values[..., begin : begin + 256]
            most = np.abs(part).max(-1, keepdims=True)
            near = np.abs(part[..., None] / most[..., None] - codes).argmin(-1)
            found[..., begin : begin + 256] = codes[near] * most
        return found

    seen = []
    # The longer axis of a layer last.
    turned = {"lora_a": lambda value: np.swapaxes(value, -1, -2), "lora_b": lambda value: value}
    weights = {name: turned[name](value).astype(np.float64) for name, value in START.items()}
    first, second = dict.fromkeys(START, 0.0), dict.fromkeys(START, 0.0)
    for number in range(1, steps + 1):
        for name, grad in GRADS[number - 1].items():
            grad = turned[name](grad).astype(np.float64)
            mu, nu = 0.9 * first[name] + 0.1 * grad, 0.999 * second[name] + 0.001 * grad**2
            update = mu / (1 - 0.9**number) / (np.sqrt(nu / (1 - 0.999**number)) + 1e-8)
            weights[name] = weights[name] - RATE * (update + DECAY * weights[name])
            first[name], second[name] = rounded(mu, maps[0]), rounded(nu, maps[1])
        seen.append({name: turned[name](value) for name, value in weights.items()})
    return seen


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest(signed):
    levels = bnb.functional.create_dynamic_map(signed=signed).numpy()
    borders = (levels[:-1] + levels[1:]) * np.float32(0.5)
    sizes = np.concatenate([10.0 ** RNG.uniform(-9, 0, 5000), 10.0 ** np.arange(-8.0, 1), RNG.uniform(0, 1, 5000)])
    values = np.concatenate([[0.0], sizes, levels, borders, np.nextafter(borders, np.float32(2))]).astype(np.float32)
    values = np.concatenate([values, -values]) if signed else values
    expected = np.searchsorted(borders, values)
    np.testing.assert_array_equal(nearest_codes(jnp.asarray(values), signed=signed), expected)


def test_adamw_8bit_is_its_papers():
    found, expected = ours(settings("adamw_8bit"), 2)[0], adam_8bit(2)
    same(found[:1], expected[:1])
    for name in START:  # a moment halfway between two codes may become either
        off = np.abs(found[1][name] - expected[1][name]) > 1e-5
        assert off.mean() < 2e-3, name


def test_adamw_8bit_is_bitsandbytes(noted):
    """Its CPU kernel packs more coarsely than its GPU kernel and the paper: the first step is the same."""
    reference = theirs(lambda p: bnb.optim.AdamW8bit(p, lr=RATE, weight_decay=DECAY), 3)
    found = ours(settings("adamw_8bit"), 3)[0]
    noted("adamw_8bit", found[:1], reference[:1])
    plain = ours(settings("adamw"), 3)[0]
    for name in START:
        off, theirs_off = (np.abs(one[-1][name] - plain[-1][name]).mean() for one in (found, reference))
        assert 0 < off < 2 * theirs_off


def test_stacks_updated_a_layer_at_a_time_are_the_same(monkeypatch):
    whole = ours(settings("adamw_8bit"), 2)
    monkeypatch.setattr(blockwise, "AT_ONCE", 1000)
    layers = ours(settings("adamw_8bit"), 2)
    same(whole[0], layers[0], 1e-6)
    assert jax.tree.structure(whole[1]) == jax.tree.structure(layers[1])


def test_small_weights_keep_moments_of_32_bits():
    small = {"lora_a": START["lora_a"][:, :200], "lora_b": START["lora_b"][:, :, :200]}
    grads = [{name: value[:, : small[name].shape[1], : small[name].shape[2]] for name, value in GRADS[0].items()}]
    same(ours(settings("adamw_8bit"), 1, small, grads)[0], ours(settings("adamw"), 1, small, grads)[0], 1e-7)
    _, state = ours(settings("adamw_8bit"), 1, small, grads)
    assert not [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.uint8]


# Bytes of state for each byte of weights.
HELD = {"adamw": 2, "adamw_8bit": 0.52, "adafactor": 0.08, "lion": 1, "muon": 1, "schedule_free_adamw": 2}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_take_what_the_table_says(name):
    state = ours(settings(name), 0)[1]
    assert tree.nbytes(state) / tree.nbytes(START) == pytest.approx(HELD[name], abs=0.02)


@pytest.mark.parametrize("held", ["masters", "stochastic"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bfloat16_weights_of_the_base_go_where_float32_ones_go(name, held):
    """Full fine-tuning: leaves of other names, whose layers are told apart all the same."""
    rename = {"lora_a": "kernel", "lora_b": "trained_kernel"}
    params = {"layers": {"proj": {rename[leaf]: jnp.asarray(value, jnp.bfloat16) for leaf, value in START.items()}}}
    grads = {"layers": {"proj": {rename[leaf]: jnp.asarray(value) for leaf, value in GRADS[0].items()}}}
    optimizer = make_optimizer(settings(name), 10, trained=lambda path: True, weights=held)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    found = tree.flatten(optax.apply_updates(params, updates))
    start = {leaf: np.asarray(jnp.asarray(value, jnp.bfloat16), np.float32) for leaf, value in START.items()}
    expected = ours(settings(name), 1, start)[0][0]
    for leaf, new in rename.items():
        value = found[f"layers/proj/{new}"]
        assert value.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(value), expected[leaf], rtol=2**-7, atol=1e-6)
        assert np.any(np.float32(value) != start[leaf])
