"""Adapters of any model's tree: whatever its modules are called, they are written and read back to the bit."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import jlora
from jlora import lora, tree
from jlora.hub.peft.names import AdapterNames

KEY = jax.random.key(0)
# Names that mean something to jlora or in a file of PEFT's, beside those that Flax gives.
NAMES = (
    *(
        "layers",
        "h",
        "layers_0",
        "blocks",
        "0",
        "1",
        "head",
        "lm_head",
        "embed_tokens",
        "wte",
        "norm",
        "model",
        "score",
    ),
    *("Dense_0", "DenseGeneral_0", "Conv_0", "a.b", "mlp", "experts", "down_proj", "weight", "base_layer", "gpt_neox"),
)
# Kind of module → its leaves' shapes; "pair" and "table" have leaves that no module of transformers has.
KINDS = {
    "dense": {"kernel": (6, 5), "bias": (5,)},
    "square": {"kernel": (4, 4), "bias": (4,)},
    "dense without bias": {"kernel": (6, 6)},
    "general": {"kernel": (6, 3, 2), "bias": (3, 2)},
    "general, several inputs": {"kernel": (3, 2, 6), "bias": (6,)},
    "conv": {"kernel": (3, 1, 4), "bias": (4,)},
    "embed": {"embedding": (7, 6)},
    "norm": {"scale": (6,), "bias": (6,)},
    "bias": {"bias": (3,)},
    "pair": {"kernel": (4, 3), "scale": (3,), "weight": (2, 3)},
    "table": {"table": (2, 3), "gain": (), "count": None},
}


def random_tree(generator, depth=0):
    """Nested modules of random kinds under random names."""
    node = {}
    for name in generator.choice(NAMES, 1 + generator.integers(4), replace=False):
        if depth < 2 and generator.random() < 0.4:
            node[str(name)] = random_tree(generator, depth + 1)
        else:
            kind = KINDS[generator.choice(list(KINDS))]
            node[str(name)] = {
                leaf: jnp.int32(3) if shape is None else jnp.asarray(generator.normal(size=shape), jnp.float32)
                for leaf, shape in kind.items()
            }
    return node


def randomised(params, generator):
    """The params with random values for everything that is trained, as a training would leave it: no padding."""

    def value(path, leaf):
        return jnp.asarray(generator.normal(size=leaf.shape), jnp.float32) if lora.is_trainable(path) else leaf

    return tree.map_with_path(value, params)


def random_config(base, generator):
    """Which modules a config adapts and which it copies, at random; what it adapts it does not copy."""
    modules = sorted({path.rpartition("/")[0] for path in tree.flatten(base)})
    chosen = generator.choice(modules, min(len(modules), 1 + generator.integers(3)), replace=False)
    saved = tuple(str(module).rpartition("/")[2] for module in chosen) if generator.random() < 0.8 else None
    bias = str(generator.choice(["none", "all", "lora_only"]))
    return lora.LoraConfig(r=2, lora_alpha=4, target_modules=r".*", modules_to_save=saved, bias=bias)


def equal(left, right):
    left, right = tree.flatten(left), tree.flatten(right)
    assert left.keys() == right.keys()
    for path, leaf in left.items():
        assert leaf.shape == right[path].shape and leaf.dtype == right[path].dtype, path
        np.testing.assert_array_equal(leaf, right[path], err_msg=path)


@pytest.mark.parametrize("seed", range(40))
def test_written_and_read_back_to_the_bit(seed, tmp_path):
    generator = np.random.default_rng(seed)
    base = random_tree(generator)
    try:
        params = lora.init(base, random_config(base, generator), KEY)
    except jlora.errors.UserError as error:
        assert any(said in str(error) for said in ("no linear", "have no biases")), error
        return
    params = randomised(params, generator)
    jlora.save_adapter(tmp_path / "adapter", params)
    loaded = jlora.load_adapter(base, tmp_path / "adapter")
    equal(params, loaded)
    merged = lora.merge(params)
    equal(merged, lora.merge(loaded))
    assert tree.flatten(merged).keys() == tree.flatten(base).keys()  # no head of its own, no copies
    assert any((leaf != tree.flatten(base)[path]).any() for path, leaf in tree.flatten(merged).items())


class Head(nn.Module):
    """An embedding and a head that go by names of jlora's own models, and of none."""

    head: str = "head"

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 6, name="embed_tokens")(tokens)
        x = nn.tanh(nn.Dense(6, name="layers")(x)) + nn.MultiHeadDotProductAttention(2, name="h")(x)
        return nn.Dense(11, name=self.head)(nn.LayerNorm(name="norm")(x))


class Listed(nnx.Module):
    def __init__(self, rngs):
        self.embed_tokens = nnx.Embed(11, 6, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(6, 6, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(6, 11, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.head(x)


TOKENS = jnp.arange(8).reshape(2, 4)


def linen():
    model = Head()
    return lambda params, tokens: model.apply({"params": params}, tokens), model.init(KEY, TOKENS)["params"]


def listed():
    return lora.from_nnx(Listed(nnx.Rngs(0)))


@pytest.mark.parametrize(
    "make, saved",
    [(linen, "head"), (linen, "embed_tokens"), (linen, "norm"), (listed, "head"), (listed, "embed_tokens")],
)
def test_models_of_flax_with_a_module_saved(make, saved, tmp_path):
    apply, base = make()
    held = [path for path in tree.flatten(base) if path.split("/")[0] == saved and len(path.split("/")) == 2]
    params = lora.init(base, lora.LoraConfig(r=2, modules_to_save=[saved]), KEY)
    assert "lm_head" not in params
    assert {f"{saved}/trained_{path.split('/')[1]}" for path in held} <= tree.flatten(params).keys()
    params = randomised(params, np.random.default_rng(0))
    jlora.save_adapter(tmp_path, params)
    assert not any("lm_head" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = jlora.load_adapter(base, tmp_path)
    equal(params, loaded)
    bound = lora.bind(apply)
    np.testing.assert_array_equal(bound(loaded, TOKENS), bound(params, TOKENS))
    assert np.abs(bound(loaded, TOKENS) - apply(base, TOKENS)).max() > 0.1
    assert jax.tree.structure(lora.merge(params)) == jax.tree.structure(base)


def test_a_module_that_is_called_like_a_stack_is_adapted_as_what_it_is():
    _, base = linen()
    config = lora.LoraConfig(r=2, target_modules=["layers", "h.query", "h.out", "head", "embed_tokens"])
    shapes = {path: leaf.shape for path, leaf in tree.flatten(lora.init(base, config, KEY)).items()}
    assert shapes["layers/lora_a"] == (6, 2) and shapes["layers/lora_b"] == (2, 6) and shapes["layers/lora_scale"] == ()
    assert shapes["h/query/lora_a"] == (6, 2) and shapes["h/query/lora_b"] == (2, 2, 3)
    assert shapes["h/out/lora_a"] == (2, 3, 2) and shapes["h/out/lora_b"] == (2, 6)
    assert not any(path.startswith("lm_head") or path.endswith("lora_tied") for path in shapes)


def test_stacks_of_other_models_stay_stacks():
    """`nn.scan` stacks the params of its blocks as jlora does."""
    stacked = {
        "h": {"dense": {"kernel": jnp.ones((3, 4, 5)), "bias": jnp.ones((3, 5))}},
        "head": {"kernel": jnp.ones((5, 7))},
    }
    params = lora.init(stacked, lora.LoraConfig(r=2), KEY)
    assert params["h"]["dense"]["lora_a"].shape == (3, 4, 2) and params["h"]["dense"]["lora_scale"].shape == (3,)
    assert AdapterNames(tree.flatten(stacked)).modules("h/dense") == [f"transformer.h.{i}.dense" for i in range(3)]


@pytest.mark.parametrize("item, what", [("q_proj", r"q_proj/kernel \(2, 4, 4\)"), ("conv", r"conv/kernel \(3, 4, 4\)")])
def test_rows_of_tokens_are_those_of_embeddings_and_heads(item, what, tmp_path):
    base = {
        "embed_tokens": {"embedding": jnp.ones((7, 4))},
        "layers": {"self_attn": {"q_proj": {"kernel": jnp.ones((2, 4, 4))}}},
        "conv": {"kernel": jnp.ones((3, 4, 4))},
    }
    with pytest.raises(jlora.errors.UserError, match=f"trainable_token_indices.*{what}.*rows of tokens"):
        lora.init(base, lora.LoraConfig(target_modules=["q_proj"], trainable_token_indices={item: [1, 2]}), KEY)
    jlora.save_adapter(tmp_path, lora.init(base, lora.LoraConfig(target_modules=["q_proj"]), KEY))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"trainable_token_indices": {item: [1, 2]}}))
    with pytest.raises(jlora.errors.UserError, match=f"trainable_token_indices.*{what}.*rows of tokens"):
        jlora.load_adapter(base, tmp_path)


def test_a_module_of_two_weights_has_no_adapter():
    base = {"two": {"kernel": jnp.ones((4, 3)), "embedding": jnp.ones((7, 4))}, "one": {"kernel": jnp.ones((4, 3))}}
    with pytest.raises(jlora.errors.UserError, match="exclude_modules can leave them out: two"):
        lora.init(base, lora.LoraConfig(target_modules=["two", "one"]), KEY)


def test_copies_that_names_cannot_tell_apart_are_refused(tmp_path):
    base = {"head": {"kernel": jnp.ones((4, 3))}, "inner": {"head": {"kernel": jnp.ones((4, 3))}}}
    params = base | {"head": {"kernel": jnp.ones((4, 3)), "trained_kernel": jnp.zeros((4, 3))}}
    with pytest.raises(jlora.errors.UserError, match=r"'head': the name also means inner\.head"):
        jlora.save_adapter(tmp_path, params)


def test_names_that_two_modules_would_share_keep_their_slash():
    leaves = {
        "a.b/kernel": jnp.ones((2, 2)),
        "a/b/kernel": jnp.ones((2, 2)),
        "norm/scale": jnp.ones(2),
        "model/norm/scale": jnp.ones(2),
    }
    called = AdapterNames(leaves)
    assert [called.modules(path) for path in ("a.b", "a/b", "norm", "model/norm")] == [
        ["a.b"],
        ["a/b"],
        ["norm"],
        ["model/norm"],
    ]


def test_folded_every_scale_is_in_b(tmp_path):
    base = {"layers": {"q_proj": {"kernel": jnp.ones((2, 4, 6))}}, "head": {"kernel": jnp.ones((6, 3, 2))}}
    config = lora.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "head"], rank_pattern={"1.q_proj": 2})
    params = randomised(lora.init(base, config, KEY), np.random.default_rng(0))
    params["layers"]["q_proj"] |= {  # as training leaves it: zeros where a layer's rank ends
        "lora_a": params["layers"]["q_proj"]["lora_a"].at[1, :, 2:].set(0),
        "lora_b": params["layers"]["q_proj"]["lora_b"].at[1, 2:].set(0),
    }
    plain, folded = tmp_path / "plain", tmp_path / "folded"
    jlora.save_adapter(plain, params)
    jlora.save_adapter(folded, params, fold=True)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (folded, plain))
    for name, value in theirs.items():
        scale = 1 if "lora_A" in name else 6 if "layers.1." in name else 3
        wide = np.zeros_like(ours[name])
        wide[tuple(map(slice, value.shape))] = scale * value  # zeros up to the largest rank
        np.testing.assert_allclose(ours[name], wide, rtol=1e-6, err_msg=name)
    written = json.loads((folded / "adapter_config.json").read_text())
    assert written["lora_alpha"] == written["r"] == 4 and not written["alpha_pattern"] and not written["rank_pattern"]
    merged = [lora.merge(jlora.load_adapter(base, folder)) for folder in (plain, folded)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *merged)


def test_experts_lie_in_the_file_as_pefts_do(tmp_path):
    """Expert by expert in A's rows, rank by rank in B's columns."""
    layers, experts, inputs, outputs, rank = 2, 3, 4, 5, 2
    kernel = jnp.ones((layers, experts, inputs, outputs))
    base = {
        "layers": {"mlp": {"experts": {"down_proj": {"kernel": kernel}}}, "q_proj": {"kernel": jnp.ones((2, 4, 4))}}
    }
    config = lora.LoraConfig(r=rank, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    params = randomised(lora.init(base, config, KEY), np.random.default_rng(0))
    jlora.save_adapter(tmp_path, params)
    held = load_file(tmp_path / "adapter_model.safetensors")
    module = params["layers"]["mlp"]["experts"]["down_proj"]
    for layer in range(layers):
        name = f"base_model.model.model.layers.{layer}.mlp.experts"
        for expert in range(experts):
            rows = slice(expert * rank, (expert + 1) * rank)
            np.testing.assert_array_equal(held[f"{name}.lora_A.weight"][rows], module["lora_a"][layer, expert].T)
            columns = held[f"{name}.lora_B.weight"][:, expert::experts]
            np.testing.assert_array_equal(columns, module["lora_b"][layer, expert].T)
    equal(jlora.load_adapter(base, tmp_path), params)
