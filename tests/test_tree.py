"""Trees, paths and rules."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jlora import quant, tree

TREE = {"layers": {"q_proj": {"kernel": 1, "lora_a": 2}}, "norm": {"scale": 3}}
FLAT = {"layers/q_proj/kernel": 1, "layers/q_proj/lora_a": 2, "norm/scale": 3}


def test_flatten_and_back():
    assert tree.flatten(TREE) == FLAT
    assert list(tree.flatten({"b": 1, "a": {"c": 2}})) == ["a/c", "b"]
    assert tree.unflatten(FLAT) == TREE


def test_maps_see_paths():
    assert tree.flatten(tree.map_with_path(lambda path, leaf: f"{path}={leaf}", TREE))["norm/scale"] == "norm/scale=3"
    seen = {}
    tree.map_modules(lambda path, module: seen.setdefault(path, module), TREE)
    assert seen == {"layers/q_proj": {"kernel": 1, "lora_a": 2}, "norm": {"scale": 3}}


def test_first_rule_that_matches_the_whole_path_wins():
    rules = ((r".*/kernel", "k"), (r"layers/.*", "l"), (r"norm/scale", "n"))
    assert tree.match_rules(rules, FLAT) == {
        "layers/q_proj/kernel": "k",
        "layers/q_proj/lora_a": "l",
        "norm/scale": "n",
    }


def test_uncovered_paths_and_dead_rules_are_all_listed():
    with pytest.raises(ValueError) as error:
        tree.match_rules(((r"kernel", "k"), (r"norm/.*", "n")), FLAT)
    message = str(error.value)
    assert "rule 'kernel' matches nothing" in message
    assert "'layers/q_proj/kernel'" in message and "'layers/q_proj/lora_a'" in message and "norm" not in message


def test_counts_are_logical_and_bytes_are_real():
    packed = quant.quantize(jnp.ones((64, 8)), double_quant=False)
    params = {"a": {"kernel": packed}, "b": {"scale": jnp.ones(3)}}
    assert tree.count(params) == 64 * 8 + 3
    assert tree.nbytes(params) == 64 * 8 // 2 + 4 * 8 + 4 * 3


def leaves_of(**shapes):
    return {path.replace("__", "/"): np.zeros(shape) for path, shape in shapes.items()}


@pytest.mark.parametrize(
    "shapes, stacked",
    [
        (dict(h__a__kernel=(3, 4, 5), h__a__bias=(3, 5), h__norm__scale=(3, 4)), True),
        (dict(h__a__kernel=(4, 5), h__a__bias=(5,)), False),
        (dict(h__a__kernel=(4, 4), h__norm__scale=(4,)), False),
        (dict(h__a__kernel=(4, 2, 2), h__a__bias=(2, 2), h__b__kernel=(2, 2, 4)), False),  # DenseGeneral
        (dict(h__a__kernel=(4, 2, 2), h__b__bias=(4,)), False),
        (dict(h__kernel=(4, 2, 2), h__a__kernel=(4, 2, 2)), False),
        (dict(h__a__kernel=(3, 4, 5), h__a__lora_a=(3, 4, 2), h__a__lora_scale=(3,), h__a__trained_bias=(3, 5)), True),
        (dict(h__a__embedding=(3, 4)), False),
    ],
    ids=str,
)
def test_a_stack_is_told_by_its_leaves(shapes, stacked):
    leaves = leaves_of(**shapes)
    found = tree.stacks_of(leaves)
    assert [found(path) is not None for path in leaves] == [stacked] * len(leaves)
    assert (found("h/a") is not None) is stacked
    assert tree.is_own(leaves) is stacked


def test_parts_of_a_stack_have_their_own_number_of_layers():
    leaves = {"layers@0-2/a/kernel": np.zeros((3, 4, 4)), "layers@3-7:4/a/kernel": np.zeros((2, 4, 4))}
    found = tree.stacks_of(leaves)
    assert list(found("layers@3-7:4/a").indices(2)) == [3, 7]
    assert tree.is_own(leaves | {"embed_tokens/embedding": np.zeros((9, 4))})
    assert not tree.is_own(leaves | {"head/kernel": np.zeros((4, 9))})


def test_layers_with_equal_signatures_share_a_stack_if_they_repeat_a_pattern():
    def stacks(layers):
        found = [tree.stack_key("h", layers, -1) for layers in tree.stack_ranges(layers)]
        return [name.partition("@")[2] for name in found]

    assert stacks("aaa") == ["0-2"]
    assert stacks("ababab") == ["0-4:2", "1-5:2"]
    assert stacks("abbb") == ["0-0", "1-3"]
    assert stacks("dddaddda") == ["0-4:4", "1-5:4", "2-6:4", "3-7:4"]
    assert stacks("sfsfsxyvwvw") == ["0-2:2", "1-3:2", "4-4", "5-5", "6-6", "7-9:2", "8-10:2"]


@pytest.mark.parametrize("seed", range(20))
def test_stacks_hold_every_layer_once_in_stacks_of_one_signature(seed):
    rng = np.random.default_rng(seed)
    layers = "".join(rng.choice(list("ab")) for _ in range(rng.integers(1, 30)))
    stacks = tree.stack_ranges(layers)
    assert sorted(i for stack in stacks for i in stack) == list(range(len(layers)))
    assert all(len({layers[i] for i in stack}) == 1 for stack in stacks)
    runs = 1 + sum(a != b for a, b in itertools.pairwise(layers))
    assert len(stacks) <= runs
    # Never more than the best single pattern.
    for period in range(1, min(8, len(layers) // 2) + 1):
        if len(layers) % period == 0 and layers == layers[:period] * (len(layers) // period):
            assert len(stacks) <= period
