"""Every form of attention against the formula written out: values and gradients."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import UserError, sharding
from jlora.kernels import attention
from jlora.kernels.attention import FORMS, Marks, attend, blocked, triton
from jlora.kernels.attention.visits import visits
from jlora.train.planning.topology import parse
from jlora.types import BRANCH

SCALE = 0.3


def formula(queries, keys, values, sinks=None, *, mask, softcap=None):
    groups = queries.shape[2] // keys.shape[2]
    keys, values = jnp.repeat(keys, groups, axis=2), jnp.repeat(values, groups, axis=2)
    scores = SCALE * jnp.einsum("bthf,bshf->bhts", queries, keys)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask[:, None], scores, -1e30)
    if sinks is not None:  # a key whose value is zero
        scores = jnp.pad(scores, [(0, 0)] * 3 + [(0, 1)]).at[..., -1].set(sinks[None, :, None])
    weights = jax.nn.softmax(scores, axis=-1)[..., : keys.shape[1]]
    return jnp.einsum("bhts,bshf->bthf", weights, values)


@functools.partial(jax.jit, static_argnames="softcap")
def formulas(mask, inputs, gradient, softcap=None):
    """The formula's output, and the gradients of its inputs."""
    y, pullback = jax.vjp(lambda *x: formula(*x, mask=mask, softcap=softcap), *inputs)
    return y, *pullback(gradient)


def mask_of(marks):
    """What each query sees."""
    positions, segments, places, owners = map(
        np.asarray, (marks.positions, marks.segment_ids, marks.key_positions, marks.key_segment_ids)
    )
    window = marks.windows[0 if marks.chosen is None else int(marks.chosen)]
    asking, own = segments[:, :, None], owners[:, None]
    distance = positions[:, :, None] - places[:, None]
    return ((own == asking) | (own == asking % BRANCH)) & (distance >= 0) & (distance < (window or 10**9))


def arrays(tokens, size, heads=6, kv_heads=3, width=10):
    random = np.random.default_rng(0)
    shapes = [(2, tokens, heads, width), (2, size, kv_heads, width), (2, size, kv_heads, width)]
    return [jnp.asarray(random.normal(size=shape).astype(np.float32)) for shape in (*shapes, shapes[0])]


def sinks_of(heads):
    """Sinks that take nearly nothing from some heads, and nearly all from others."""
    return jnp.linspace(-4.0, 6.0, heads)


def by_form(form, marks, softcap, queries, keys, values, sinks=None):
    return attend(queries, keys, values, marks, SCALE, softcap, form, sinks)


def with_gradients(form, marks, softcap, gradient):
    """(queries, keys, values, sinks) → the form's output, and the gradients of these."""

    def run(*inputs):
        y, pullback = jax.vjp(functools.partial(by_form, form, marks, softcap), *inputs)
        return y, *pullback(gradient)

    return run


def packed(tokens, branches=False, **settings):
    """Marks of rows that hold two documents and, in the second row, padding; or two branches off one beginning."""
    index = np.broadcast_to(np.arange(tokens), (2, tokens))
    first, second = tokens // 3, tokens // 2
    segments, positions = np.where(index < first, 1, 2), np.where(index < first, index, index - first)
    if branches:
        segments = np.where(index < first, 1, np.where(index < second, 1 + BRANCH, 1 + 2 * BRANCH))
        positions = np.where(index < second, index, index - second + first)
    segments[1, -5:] = 0
    own = jnp.asarray(positions, jnp.int32), jnp.asarray(segments, jnp.int32)
    return Marks(*own, *own, branches=branches, **settings)


def same(form, marks, softcap=None, sinks=False, **sizes):
    """Asserts that values and gradients are the formula's."""
    *inputs, weights = arrays(*marks.size, **sizes)
    if sinks:
        inputs.append(sinks_of(weights.shape[2]))

    found = jax.jit(with_gradients(form, marks, softcap, weights))(*inputs)
    for ours, theirs in zip(found, formulas(mask_of(marks), inputs, weights, softcap), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocked, "NARROWEST", 32)
    monkeypatch.setattr(blocked, "SCORES", 1)


@pytest.mark.parametrize(("form", "tokens"), [*itertools.product(["plain", "blocked"], [1, 33, 150, 300])])
def test_values_and_gradients_are_the_formulas(form, tokens, small_blocks):
    same(form, packed(tokens))


@pytest.mark.parametrize("form", ["plain", "blocked"])
@pytest.mark.parametrize("window", [1, 3, 40])
def test_branches_windows_and_soft_caps_are_the_formulas(form, window, small_blocks):
    same(form, packed(97, branches=True, windows=(None, window), chosen=jnp.int32(1)), softcap=1.5)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, 1.5)])
def test_splash_kernels_are_the_formulas(window, softcap):
    same("splash_interpreted", packed(150, windows=(window,)), softcap, heads=4, kv_heads=2)


def test_splash_kernels_take_the_window_of_the_layer():
    same("splash_interpreted", packed(130, windows=(None, 5), chosen=jnp.int32(1)), heads=2, kv_heads=1)


@pytest.mark.parametrize("softcap", [pytest.param(None, marks=pytest.mark.slow), 1.5])
def test_splash_kernels_join_a_branch_with_what_it_branches_off(softcap):
    same("splash_interpreted", packed(150, branches=True), softcap, heads=4, kv_heads=2)
    same("splash_interpreted", dataclasses.replace(packed(130), branches=True), softcap, heads=2, kv_heads=1)


@functools.cache
def triton_program():
    """(marks, queries, keys, values, gradient) → output and gradients, by small blocks. Compiled once: it takes most of
    the time."""
    sides = {"forward": (32, 16), "queries": (16, 32), "keys": (32, 16)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "TILES", {name: {(4, 256): triton.Tile(*tile, 4, 2)} for name, tile in sides.items()})

        def run(marks, *inputs):
            *inputs, grad = inputs
            y, pullback = jax.vjp(lambda *x: attend(*x, marks, SCALE, 1.5, "triton_interpreted"), *inputs)
            return y, *pullback(grad)

        marks = packed(97, branches=True, windows=WINDOWS, chosen=jnp.int32(0))
        return jax.jit(run).lower(marks, *arrays(97, 97)).compile()


WINDOWS = (None, 1, 3, 40)


def documents(*lengths, tokens=97, **settings):
    """Marks of two rows of documents of these lengths, whatever is left over being one more."""
    segments = np.repeat(np.arange(len(lengths) + 1), [*lengths, tokens - sum(lengths)])
    positions = np.concatenate([np.arange(count) for count in (*lengths, tokens - sum(lengths))])
    own = (jnp.asarray(np.broadcast_to(x, (2, tokens)), jnp.int32) for x in (positions, segments))
    positions, segments = own
    return Marks(positions, segments, positions, segments, **settings)


def marks_of_many_kinds():
    """As `triton_program` takes them."""
    for chosen in range(len(WINDOWS)):
        settings = dict(branches=True, windows=WINDOWS, chosen=jnp.int32(chosen))
        yield from (packed(97, **settings), documents(**settings), documents(32, 7, 1, 24, 20, **settings))
    yield dataclasses.replace(packed(97, windows=WINDOWS, chosen=jnp.int32(0)), branches=True)


def test_triton_kernels_are_the_formulas():
    for marks in marks_of_many_kinds():
        *inputs, grad = arrays(97, 97)
        ours, theirs = triton_program()(marks, *inputs, grad), formulas(mask_of(marks), inputs, grad, 1.5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), ours, theirs)


def test_triton_kernels_do_not_look_at_blocks_of_other_documents():
    marks = documents(32, branches=True, windows=WINDOWS, chosen=jnp.int32(0))
    inputs = arrays(97, 97)
    spoilt = [x.at[:, :32].set(jnp.nan) for x in inputs]
    for ours, theirs in zip(triton_program()(marks, *spoilt), triton_program()(marks, *inputs), strict=True):
        np.testing.assert_array_equal(ours[:, 32:], theirs[:, 32:])
        assert np.isnan(ours[:, :32]).all()


def test_triton_kernels_take_fewer_queries_than_keys_and_those_that_see_none():
    cached = packed(120)
    segments = cached.segment_ids[:, 80:110].at[1, 20:].set(7)
    marks = Marks(cached.positions[:, 80:110], segments, cached.key_positions, cached.key_segment_ids)
    *inputs, _ = arrays(30, 120)
    grad = np.random.default_rng(1).normal(size=inputs[0].shape).astype(np.float32)

    found = jax.jit(with_gradients("triton_interpreted", marks, None, grad))(*inputs)
    blind = np.asarray(segments == 7)[..., None, None]
    y, *gradients = formulas(mask_of(marks), inputs, np.where(blind, 0, grad))
    theirs = [np.where(blind, 0, y), *gradients]
    for one, two in zip(found, theirs, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=2e-5)


INTERPRETED = ("splash_interpreted", "triton_interpreted")  # take seconds; `WITH_SINKS` has them without a window


@pytest.mark.parametrize(
    ("form", "window"),
    [
        pytest.param(form, window, marks=[pytest.mark.slow] * (form in INTERPRETED and window is None))
        for form in ("plain", "blocked", *INTERPRETED)
        for window in (None, 5)
    ],
)
def test_sinks_take_part_in_the_softmax_of_every_form(form, window, small_blocks):
    same(form, packed(70, windows=(None, window), chosen=jnp.int32(1)), sinks=True, heads=4, kv_heads=2, width=16)


@pytest.mark.parametrize("form", ["plain", "blocked", "triton_interpreted"])
def test_sinks_take_part_where_keys_lie_in_a_cache(form, small_blocks):
    cached = packed(60)
    queries = cached.positions[:, 30:50], cached.segment_ids[:, 30:50]
    marks = Marks(*queries, cached.key_positions, cached.key_segment_ids, branches=form != "triton_interpreted")
    same(form, marks, sinks=True, heads=4, kv_heads=2, width=16)


def test_sinks_are_shared_by_branches_and_what_they_branch_off():
    same("splash_interpreted", packed(70, branches=True), sinks=True, heads=4, kv_heads=2, width=16)


@pytest.mark.parametrize("form", ["plain", "blocked"])
def test_a_query_that_sees_only_its_sink_gives_zeros(form, small_blocks):
    marks = dataclasses.replace(packed(40), key_segment_ids=jnp.full((2, 40), 9))
    *inputs, weights = arrays(40, 40)
    for found in jax.jit(with_gradients(form, marks, None, weights))(*inputs, sinks_of(6)):
        np.testing.assert_array_equal(found, 0)


def test_sinks_far_below_the_scores_change_nothing_and_far_above_take_all():
    *inputs, _ = arrays(33, 33)
    marks = packed(33)
    plain = by_form("plain", marks, None, *inputs)
    low, high = (by_form("plain", marks, None, *inputs, jnp.full(6, value)) for value in (-1e30, 1e30))
    np.testing.assert_array_equal(low, plain)
    np.testing.assert_array_equal(high, 0)


def test_sinks_of_16_bits_are_scores_of_32():
    *inputs, weights = (x.astype(jnp.bfloat16) for x in arrays(40, 40))
    sinks = sinks_of(6).astype(jnp.bfloat16)
    marks = packed(40)
    ours = jax.jit(with_gradients("plain", marks, None, weights))(*inputs, sinks)
    wide = [x.astype(jnp.float32) for x in (*inputs, sinks, weights)]
    for found, one in zip(ours, formulas(mask_of(marks), wide[:-1], wide[-1]), strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found, one, rtol=0, atol=0.02 * float(jnp.abs(one).max()))


blocks_visited = jax.jit(visits, static_argnums=(1, 2, 3))


@pytest.mark.parametrize(("rows", "columns"), [(32, 16), (16, 64)])
def test_visits_are_of_the_blocks_that_are_seen(rows, columns):
    for marks in marks_of_many_kinds():
        mask = mask_of(marks)
        mask = np.pad(mask, [(0, 0), (0, -97 % rows), (0, -97 % columns)])
        mask = mask.reshape(2, mask.shape[1] // rows, rows, -1, columns)
        for by_keys in (False, True):
            seen, whole = (x.swapaxes(1, 2) if by_keys else x for x in (mask.any((2, 4)), mask.all((2, 4))))
            order, counts = map(np.asarray, blocks_visited(marks, rows, columns, by_keys))
            for b, i in np.ndindex(*seen.shape[:2]):
                some, end = counts[b, i]
                assert sorted(order[b, i]) == list(range(seen.shape[2]))
                assert whole[b, i][order[b, i, some:end]].all()
                assert set(np.flatnonzero(seen[b, i])) <= set(order[b, i, :end])


def test_rows_of_documents_cost_what_the_documents_do():
    def counts(marks):
        return np.asarray(blocks_visited(marks, 16, 16).counts)[0]

    # Of each document's four pairs of blocks, two are on the diagonal, one is seen whole, and one comes later.
    assert counts(documents(32, 32, 32, tokens=128)).sum(axis=0).tolist() == [4 * 2, 4 * 3]
    assert counts(documents(windows=(16,), tokens=128))[:, 1].tolist() == [1] + [2] * 7
    shared = packed(96, branches=True)  # 32 tokens, and branches of 16 and of 48 off them
    assert counts(shared)[:, 1].tolist() == [1, 2, 3, 3, 4, 5]
    # Padding is segment 0: a last block that has it and a document seems to have all that lie between.
    padded = documents(40, 20, tokens=64)
    ids = (padded.segment_ids + 1) % 3
    padded = dataclasses.replace(padded, segment_ids=ids, key_segment_ids=ids, branches=False)
    assert counts(padded)[:, 1].tolist() == [1, 2, 3, 2]


@pytest.mark.slow
@pytest.mark.parametrize("card", ["a100-40", "h100", "rtx4090"])
def test_triton_kernels_compile(card):
    """And have room in every card's shared memory."""
    topology = parse(card)
    if not topology.has_compiler:
        pytest.skip(f"needs jlora[{topology.extra}]")
    mesh = sharding.make_mesh(sharding.MeshConfig(), list(topology.devices()))

    def run(softcap, positions, segments, *inputs):
        windows = (None,) if softcap is None else (None, 512)
        chosen = None if softcap is None else positions[0, 0]
        marks = Marks(positions, segments, positions, segments, chosen, windows, branches=softcap is not None)
        *inputs, grad = inputs
        y, pullback = jax.vjp(lambda *x: attend(*x, marks, SCALE, softcap, "triton"), *inputs)
        return y, *pullback(grad)

    def kernels(run, *arrays):
        compiled = sharding.jit(run).lower(*arrays).compile()
        return compiled.as_text().count('custom_call_target="__gpu$xla.gpu.triton"')

    def shapes(width, dtype, lead=(), tokens=2048):
        marks = [((2, tokens), jnp.int32)] * 2
        arrays = [((2, tokens, heads, width), dtype) for heads in (8, 2, 2, 8)]
        one = jax.NamedSharding(mesh, jax.P())
        return [jax.ShapeDtypeStruct((*lead, *shape), dtype, sharding=one) for shape, dtype in (*marks, *arrays)]

    for width, dtype, softcap in itertools.product((64, 128, 256), (jnp.bfloat16, jnp.float32), (None, 30.0)):
        assert kernels(functools.partial(run, softcap), *shapes(width, dtype)) == 3
    one = functools.partial(run, None)
    assert kernels(one, *shapes(80, jnp.bfloat16, tokens=2001)) == 3
    assert kernels(jax.vmap(one), *shapes(128, jnp.bfloat16, (3,))) == 3
    with jax.default_matmul_precision("highest"):
        assert [kernels(one, *shapes(width, jnp.float32)) for width in (64, 128, 256)] == [3, 3, 3]


OWN, WHOLE = (dict(fsdp=2, tensor=2), (4, 2)), (dict(fsdp=2, tensor=2), (3, 1))
FEWER_KEYS, APART = (dict(tensor=2, sequence=2), (8, 1)), (dict(fsdp=2, sequence=2), (3, 1))
MESHES = {
    "blocked, a device has its own heads": OWN,
    "splash_interpreted, a device has its own heads": OWN,
    "blocked, heads that do not divide": WHOLE,
    "splash_interpreted, heads that do not divide": WHOLE,
    "splash_interpreted, fewer heads of keys than ways": (dict(fsdp=2, tensor=2), (4, 1)),
    "splash_interpreted, tokens": (dict(sequence=4), (8, 4)),
    "plain, tokens and fewer heads of keys than ways": FEWER_KEYS,
    "blocked, tokens and fewer heads of keys than ways": FEWER_KEYS,
    "splash_interpreted, tokens and fewer heads of keys than ways": FEWER_KEYS,
    "plain, tokens and heads that do not divide": APART,
    "blocked, tokens and heads that do not divide": APART,
    "triton_interpreted, a device has its own heads": OWN,
    "triton_interpreted, tokens and heads that do not divide": APART,
}


# Each form has a case with sinks and one without.
WITH_SINKS = (
    "splash_interpreted, a device has its own heads",
    "triton_interpreted, a device has its own heads",
    "blocked, heads that do not divide",
    "plain, tokens and fewer heads of keys than ways",
    "blocked, tokens and heads that do not divide",
)


@pytest.mark.parametrize(("case", "sinks"), [(case, case in WITH_SINKS) for case in MESHES])
def test_forms_are_the_formulas_on_a_mesh(case, sinks, small_blocks):
    form, (sizes, heads) = case.partition(",")[0], MESHES[case]
    mesh = sharding.make_mesh(sharding.MeshConfig(**sizes), jax.devices()[:4])
    *inputs, weights = arrays(140, 140, *heads)
    marks = packed(140, windows=(None, 60), chosen=jnp.int32(1)) if "tokens" in case else packed(140)
    place = jax.NamedSharding(mesh, jax.P(sharding.ROWS, sharding.TOKENS))
    placed = jax.device_put(inputs, place)
    if sinks:
        inputs, placed = ([*x, sinks_of(heads[0])] for x in (inputs, placed))
        placed[-1] = jax.device_put(placed[-1], jax.NamedSharding(mesh, jax.P()))

    found = sharding.jit(with_gradients(form, marks, None, weights))(*placed)
    for ours, theirs in zip(found, formulas(mask_of(marks), inputs, weights), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("heads", "moved"),
    [
        ((8, 4), {"all-to-all"}),
        ((8, 1), {"all-to-all"}),
        ((3, 1), {"all-gather"}),
    ],
)
def test_tokens_that_a_mesh_splits_change_places_with_heads_or_keys_are_gathered(heads, moved):
    mesh = sharding.make_mesh(sharding.MeshConfig(sequence=4), jax.devices()[:4])
    place = jax.NamedSharding(mesh, jax.P(sharding.ROWS, sharding.TOKENS))
    queries, keys, *_ = (
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in arrays(256, 256, *heads, width=16)
    )
    index = jax.ShapeDtypeStruct((2, 256), jnp.int32, sharding=place)

    def one(queries, keys, values, index):
        return attend(queries, keys, values, Marks(index, index, index, index), SCALE)

    text = sharding.jit(one).lower(queries, keys, keys, index).compile().as_text()
    kinds = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"
    assert {kind for _, kind in re.findall(rf"= \(?(f32\[).*? ({kinds})\(", text)} == moved
    assert not re.search(r"= \(?f32\[2,256,8,16\].*? all-gather", text)  # whole queries nowhere


def test_the_scores_of_one_device_decide(monkeypatch):
    marks, mesh = packed(128), sharding.make_mesh(sharding.MeshConfig(data=2, tensor=2, sequence=2))
    cached = dataclasses.replace(marks, positions=marks.positions[:, :64], segment_ids=marks.segment_ids[:, :64])
    alone = attention._scores(marks, 8)
    with sharding.on(mesh):
        assert attention._scores(marks, 8) == alone // 8
        assert attention._scores(marks, 2) == alone // 4 // 4  # sequence does not divide what tensor leaves
        assert attention._scores(marks, 3) * 8 == alone * 3 // 2
        assert attention._scores(cached, 8) == 2 * 8 * 64 * 128 // 4
    monkeypatch.setitem(attention.PLAIN, "cpu", alone // 8)
    assert attention._chosen("auto", marks, 8) == "blocked"
    with sharding.on(mesh):
        assert attention._chosen("auto", marks, 8) == "plain"


def test_a_form_for_whole_rows_is_refused_where_keys_are_gathered():
    mesh = sharding.make_mesh(sharding.MeshConfig(sequence=2), jax.devices()[:2])
    with sharding.on(mesh):
        attention.require("splash_interpreted", "cpu", packed(64), 4)
        with pytest.raises(UserError, match="a mesh that splits tokens and not the heads"):
            attention.require("splash_interpreted", "cpu", packed(64), 3)


@pytest.mark.parametrize("form", ["plain", "blocked"])
def test_fewer_queries_than_keys_see_what_lies_in_the_cache(form, small_blocks):
    cached = packed(200)
    queries = cached.positions[:, 120:160], cached.segment_ids[:, 120:160]
    same(form, Marks(*queries, cached.key_positions, cached.key_segment_ids))


def test_a_query_sees_its_document_and_the_one_that_it_branches_off():
    marks = packed(60, branches=True, windows=(7,))
    np.testing.assert_array_equal(marks.mask(), mask_of(marks))
    np.testing.assert_array_equal(marks.mask(slice(3, 9), slice(0, 20)), mask_of(marks)[:, 3:9, :20])


def test_long_rows_keep_no_scores(small_blocks):
    """Nothing that the backward pass keeps, and nothing within a pass, is as large as the scores."""
    marks, (*inputs, _) = packed(512), arrays(512, 512)

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (math.prod(variable.aval.shape) for variable in equation.outvars)
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from sizes(getattr(inner, "jaxpr", inner))

    def loss(form, *x):
        return jnp.sum(attend(*x, marks, SCALE, None, form))

    def largest(form):
        return max(sizes(jax.make_jaxpr(jax.grad(functools.partial(loss, form), argnums=(0, 1, 2)))(*inputs).jaxpr))

    scores = 2 * 6 * 512 * 512
    assert largest("plain") >= scores // 4
    blocked_largest = largest("blocked")
    assert blocked_largest < scores // 4, blocked_largest


def test_what_the_backward_pass_keeps_is_linear_in_the_length():
    marks, (*inputs, _) = packed(96), arrays(96, 96)
    _, pullback = jax.vjp(lambda *x: attend(*x, marks, SCALE), *inputs)
    kept = jax.tree.leaves(pullback)
    assert max(leaf.size for leaf in kept if hasattr(leaf, "size")) <= max(x.size for x in inputs)


def test_each_device_has_its_order_of_forms_and_long_rows_their_own(monkeypatch):
    short, branched, cached = packed(128), packed(128, branches=True, windows=(9,)), packed(128)
    monkeypatch.setattr(attention, "target", lambda: "tpu")
    assert attention._chosen("auto", short, 4) == "splash"
    assert attention._chosen("auto", packed(128, branches=True), 4) == "splash"
    assert attention._chosen("auto", branched, 4) == "plain"
    monkeypatch.setattr(attention, "PLAIN", dict.fromkeys(attention.PLAIN, 100))
    assert attention._chosen("auto", branched, 4) == "blocked"
    monkeypatch.setattr(attention, "target", lambda: "cpu")
    assert attention._chosen("auto", cached, 4) == "blocked"
    monkeypatch.setattr(attention, "target", lambda: "gpu")
    monkeypatch.setattr(triton, "capability", lambda: (8, 0))
    assert attention._chosen("auto", short, 4, 128) == "triton"
    assert attention._chosen("auto", short, 4, 512) == "blocked"
    monkeypatch.setattr(triton, "capability", lambda: (7, 5))
    assert attention._chosen("auto", short, 4, 128) == "blocked"
    assert attention.BEST.keys() == attention.PLAIN.keys()
    assert {name for names in attention.BEST.values() for name in names} <= FORMS.keys()


def test_a_form_that_cannot_be_used_is_refused_with_the_reason():
    *inputs, _ = arrays(40, 40)
    with pytest.raises(UserError, match="'splash_interpreted' cannot be used here: windows in segments that branch"):
        attend(
            *inputs,
            packed(40, branches=True, windows=(None, 7), chosen=jnp.int32(0)),
            SCALE,
            None,
            "splash_interpreted",
        )
    with pytest.raises(UserError, match="'splash' runs on a tpu, and this is a cpu; 'auto' runs anywhere"):
        attend(*inputs, packed(40), SCALE, None, "splash")
    with pytest.raises(UserError, match="'triton_interpreted' cannot be used here: fewer than 16 queries"):
        attend(*(x[:, :9] for x in inputs), packed(9), SCALE, None, "triton_interpreted")
    with pytest.raises(UserError, match="found the attention form 'flash'; expected one of auto, plain"):
        attend(*inputs, packed(40), SCALE, None, "flash")
