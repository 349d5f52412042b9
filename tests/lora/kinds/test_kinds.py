"""The laws that every kind of adapter keeps: what is applied is what is merged, and its leaves say what they are."""

import itertools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import lora, quant, tree
from jlora.lora.kinds import COPIES, KINDS, LEAVES, PRODUCT, TOKENS, changed_leaves, check, leaf_of, not_held
from jlora.lora.kinds.dora import base_norms
from jlora.lora.kinds.kind import SCALE

SIZES = {"inputs": 64, "outputs": 24, "rank": 5, "shard": 7, "tokens": 3, "width": 64}
BASES = (None, *quant.FORMATS, "merge-aware")
NAMED = {type(kind).__name__: kind for kind in KINDS}
PAIRS = [pair for pair in itertools.combinations(NAMED, 2) if "Copies" not in pair]


def base(form, seed=0):
    kernel = 0.2 * jax.random.normal(jax.random.key(seed), (SIZES["inputs"], SIZES["outputs"]))
    if form == "merge-aware":
        kernel = quant.Rounded(kernel, "nf4", False)
    elif form:
        kernel = quant.quantize(kernel, form)
    return {"kernel": kernel, "bias": jnp.linspace(-1, 1, SIZES["outputs"])}


def leaves(kind, module):
    """Random leaves of a kind; settings that must fit the base are made for it."""
    settings = {
        "lora_scale": jnp.float32(0.5),
        "lora_token_ids": jnp.array([7, 0, 23]),
        "lora_base_norm": base_norms(module["kernel"]),
    }
    found = {}
    for leaf in kind.leaves:
        shape = tuple(SIZES[axis] for axis in leaf.axes)
        if leaf.trained or (leaf.absent == "any" and leaf.axes):
            found[leaf.name] = 0.3 * jax.random.normal(jax.random.key(zlib.crc32(leaf.name.encode())), shape)
        elif leaf.name in settings:
            found[leaf.name] = settings[leaf.name]
    return found


def adapted(names, form):
    """A module with these kinds of adapter, and the product that all but trained copies and token rows need."""
    module = base(form)
    kinds = [NAMED[name] for name in names]
    if any(kind not in (COPIES, TOKENS) and SCALE not in kind.leaves for kind in kinds):
        kinds = [PRODUCT, *kinds]
    for kind in dict.fromkeys(kinds):
        module |= leaves(kind, module) | ({"trained_bias": jnp.ones(24)} if kind is COPIES else {})
    return module


def by_merging(x, module):
    merged = lora.merge({"proj": module})["proj"]
    dense = quant.dequantize(merged["kernel"]) if quant.is_packed(merged["kernel"]) else merged["kernel"]
    return x @ dense + merged["bias"][None]


@pytest.mark.parametrize("form", BASES)
@pytest.mark.parametrize("names", [*((name,) for name in NAMED), *PAIRS], ids="+".join)
def test_what_is_applied_is_what_is_merged(names, form):
    module = adapted(names, form)
    x = jax.random.normal(jax.random.key(3), (7, SIZES["inputs"]))
    ours = lora.linear(x, module)
    np.testing.assert_allclose(ours, by_merging(x, module), rtol=1e-4, atol=2e-4)
    assert np.abs(ours - lora.linear(x, lora.strip(module))).max() > 0.01


@pytest.mark.parametrize("form", BASES)
def test_a_copy_takes_the_place_of_a_kernel(form):
    module = base(form) | {"trained_kernel": jnp.ones((SIZES["inputs"], SIZES["outputs"]))}
    x = jax.random.normal(jax.random.key(3), (7, SIZES["inputs"]))
    np.testing.assert_allclose(lora.linear(x, module), by_merging(x, module), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["Copies", "Product", "TokenRows"])
def test_an_embedding_gives_the_rows_of_the_merged_one(name):
    kind, embedding = NAMED[name], jax.random.normal(jax.random.key(0), (64, 24))
    module = {"embedding": embedding} | leaves(kind, {"kernel": embedding})
    module |= {"lora_tokens": jnp.ones((3, 24))} if kind is TOKENS else {}
    module |= {"trained_embedding": embedding + 1} if kind is COPIES else {}
    assert "embedding" in changed_leaves(module)
    tokens = jnp.array([[0, 7, 5], [23, 1, 63]])
    expected = lora.merge({"embed": module})["embed"]["embedding"]
    np.testing.assert_allclose(lora.embed(tokens, module), expected[tokens], rtol=1e-5, atol=1e-5)
    assert np.abs(expected - embedding).max() > 0.01


def test_names_say_what_a_leaf_is():
    for kind in KINDS:
        assert kind.title and (kind is COPIES or kind.is_in([leaf.name for leaf in kind.leaves]))
        for leaf in kind.leaves:
            assert leaf_of(leaf.name) == leaf and tree.is_added(leaf.name)
            ends = {("inputs", "rank"): "_a", ("rank", "outputs"): "_b", ("shard", "outputs"): "_b"}
            assert leaf.name.endswith(ends.get(leaf.axes, "")), "jlora.sharding goes by this"
    assert all(tree.is_added(name) for name in LEAVES)
    assert leaf_of("kernel") is None and leaf_of("trained_scale").like_b


def test_a_format_refuses_kinds_that_it_does_not_hold():
    tree_of = {f"proj/{leaf.name}": 0 for kind in KINDS for leaf in kind.leaves} | {"norm/trained_scale": 0}
    refused = not_held(tree_of, [PRODUCT])
    assert {"proj/lora_magnitude", "proj/lora_tokens", "proj/lora_bias", "norm/trained_scale"} <= refused.keys()
    assert not {"proj/lora_a", "proj/lora_start_b", "proj/lora_scale", "proj/lora_token_ids"} & refused.keys()


def test_types_that_there_are_not_are_refused():
    check(lora.LoraConfig(use_dora=True))
    with pytest.raises(ValueError, match="peft_type='LORE': expected one of LORA"):
        check(lora.LoraConfig(peft_type="LORE"))
