"""Trees, paths and rules."""

import jax.numpy as jnp
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
