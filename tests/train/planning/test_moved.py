"""What moves between devices, read off compiled programs."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jlora.train.planning.moved import received

HEAD = "HloModule m\n\n"


def entry(*lines):
    return HEAD + "ENTRY %main (p: f32[4]) -> f32[4] {\n" + "".join(f"  {line}\n" for line in lines) + "}\n"


def test_a_loop_counts_as_often_as_it_turns():
    mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("x"))

    @functools.partial(jax.jit, out_shardings=split)
    def looped(x, w):
        def body(x, w):
            whole = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))
            return jax.lax.with_sharding_constraint(jnp.tanh(jnp.flip(whole)) * w, split), None

        return jax.lax.scan(body, x, w)[0]

    x = jax.device_put(jnp.zeros(1024, jnp.float32), split)
    w = jax.device_put(jnp.ones((5, 1024), jnp.float32), NamedSharding(mesh, PartitionSpec(None, "x")))
    found = received(looped.lower(x, w).compile().as_text())
    # Five times three of four parts of what is gathered, give or take what is moved before and after the loop.
    assert found["all-gather"] == 5 * 3 * 1024


def test_each_kind_by_its_ring():
    text = entry(
        "%a = f32[8,4]{1,0} all-gather(%p), replica_groups={{0,1},{2,3}}, dimensions={0}",
        "%b = bf16[8]{0} all-reduce(%p), replica_groups=[1,4]<=[4], to_apply=%add",
        "%c = f32[2]{0} reduce-scatter(%p), replica_groups={{0,1,2,3}}, dimensions={0}",
        "%d = f32[16]{0} all-to-all(%p), replica_groups={{0,1,2,3}}",
        "%e = u8[100]{0} collective-permute(%p), source_target_pairs={{0,1}}",
        "%f = f32[8]{0} add(%a, %b)",
    )
    assert received(text) == {
        "all-gather": 8 * 4 * 4 // 2,
        "all-reduce": 2 * 8 * 2 * 3 // 4,
        "reduce-scatter": 2 * 4 * 3,
        "all-to-all": 16 * 4 * 3 // 4,
        "collective-permute": 100,
    }


def test_what_is_started_asynchronously_returns_its_operands_too():
    text = entry(
        "%s = (u8[25]{0}, u8[100]{0}) all-gather-start(%p), replica_groups=[1,4]<=[4]",
        "%d = u8[100]{0} all-gather-done(%s)",
    )
    assert received(text) == {"all-gather": 75}


def test_groups_by_the_axes_of_a_mesh():
    text = entry(
        "%a = u8[64]{0} all-gather(%p), replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}",
        "%b = u8[80]{0} all-to-all(%p), replica_groups=mesh['x'=2,'y'=4], device_ids=[0] {'x','y':(1)2}",
    )
    assert received(text) == {"all-gather": 48, "all-to-all": 60}


def test_turns_of_a_while_and_branches():
    text = (
        HEAD
        + "%body (p: f32[4]) -> f32[4] {\n  %g = f32[8]{0} all-gather(%p), replica_groups={{0,1}}\n}\n\n"
        + "%other (p: f32[4]) -> f32[4] {\n  %g = f32[8]{0} all-to-all(%p), replica_groups={{0,1}}\n}\n\n"
        + entry(
            '%w = f32[4] while(%p), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"32"}}',
            "%c = f32[4] conditional(%i, %p, %p), branch_computations={%other, %body}",
        ).removeprefix(HEAD)
    )
    assert received(text) == {"all-gather": 33 * 16, "all-to-all": 16}


def test_turns_that_only_the_condition_of_a_while_says():
    """As TPU's compiler writes loops over layers; where the limit is not a constant, once."""
    gte = "%i = s32[]{:T(128)} get-tuple-element(%p), index=0"
    text = (
        HEAD
        + "%body (p: f32[4]) -> f32[4] {\n  %g = f32[8]{0} all-gather(%p), replica_groups={{0,1}}\n}\n\n"
        + "%layers (p: (s32[])) -> pred[] {\n  %c.1 = s32[]{:T(128)} constant(32)\n  "
        + gte
        + "\n  ROOT %lt = pred[]{:T(512)} compare(%i, %c.1), direction=LT\n}\n\n"
        + "%open (p: (s32[])) -> pred[] {\n  %n = s32[] get-tuple-element(%p), index=1\n  "
        + gte
        + "\n  ROOT %lt.1 = pred[]{:T(512)} compare(%i, %n), direction=LT\n}\n\n"
        + entry(
            "%w = f32[4] while(%p), condition=%layers, body=%body",
            "%v = f32[4] while(%p), condition=%open, body=%body",
        ).removeprefix(HEAD)
    )
    assert received(text) == {"all-gather": 33 * 16}


def test_pieces_of_one_collective_count_once():
    """As TPU's compiler writes them: a fusion that starts it, one for each product beside it, one that ends it."""
    gather = "%{} = u8[64]{{0}} all-gather(%p), channel_id={}, replica_groups=[1,4]<=[4], dimensions={{0}}"
    pieces = {"start": 7, "beside": 7, "done": 7, "another": 8}
    text = HEAD
    for name, channel in pieces.items():
        text += f"%{name} (p: u8[16]) -> u8[64] {{\n  {gather.format('g' + name, channel)}\n}}\n\n"
    fusions = [f"%f{name} = u8[64]{{0}} fusion(%p), kind=kCustom, calls=%{name}" for name in pieces]
    body = "%body (p: u8[16]) -> u8[64] {\n" + "".join(f"  {line}\n" for line in fusions) + "}\n\n"
    loop = '%w = u8[64] while(%p), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}'
    assert received(text + body + entry(loop).removeprefix(HEAD)) == {"all-gather": 5 * 2 * 48}


def test_a_tpus_reduce_scatter_is_a_fusion_of_an_all_reduce():
    text = (
        HEAD
        + "%all-reduce-scatter.3 (p: f32[16]) -> f32[4] {\n"
        + "  %r = f32[16]{0} all-reduce(%p), channel_id=3, replica_groups=[1,4]<=[4], to_apply=%add\n}\n\n"
        + entry("%f = f32[4]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.3").removeprefix(HEAD)
    )
    assert received(text) == {"reduce-scatter": 48}
