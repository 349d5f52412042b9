"""Training that sees the packed sum: what merging packs afterwards is the trained model itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

import jlora
from jlora import hub, lora, quant, tree
from jlora.models import build
from jlora.quant import Rounded

MODEL = build(
    transformers.Qwen3MoeConfig(
        vocab_size=37,
        hidden_size=64,
        intermediate_size=72,
        moe_intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=3,
        num_experts_per_tok=2,
        mlp_only_layers=[0],
    ).to_dict()
)
BASE = jax.jit(MODEL.random_params)(jax.random.key(0))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 37, (3, 7)), jnp.int32)
KINDS = {
    "few": dict(target_modules=["q_proj", "up_proj"]),
    "plain": dict(target_modules="all-linear"),
    "dora": dict(use_dora=True, target_modules=["q_proj", "o_proj"]),
    "pissa": dict(init_lora_weights="pissa", lora_bias=True, target_modules=["k_proj", "up_proj"]),
    "copies": dict(target_modules=["q_proj"], modules_to_save=["down_proj", "v_proj"]),
    "experts": dict(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], target_modules=["v_proj"]),
}


def is_packed(path, kind):
    """Whether it is the kernel of a linear that the adapter of this kind changes; for "plain" that is each of them."""
    if not (path.startswith("layers") and path.endswith("/kernel")) or "/mlp/gate/" in path:
        return False
    settings = KINDS[kind]
    changed = [*settings["target_modules"], *settings.get("modules_to_save", ())]
    changed += [name.split(".")[-1] for name in settings.get("target_parameters", ())]
    return kind == "plain" or path.split("/")[-2] in changed


def rounded(kind="plain", format="nf4", double_quant=True):
    return tree.map_with_path(
        lambda path, leaf: Rounded(leaf, format, double_quant) if is_packed(path, kind) else leaf, BASE
    )


def packed_base(kind="plain", format="nf4"):
    return tree.map_with_path(lambda path, leaf: quant.quantize(leaf, format) if is_packed(path, kind) else leaf, BASE)


def adapted(params, kind):
    frozen, trainable = lora.split(lora.init(params, jlora.LoraConfig(r=3, **KINDS[kind]), jax.random.key(1)))

    def moved(path, leaf):
        moves = np.random.default_rng(len(path)).normal(0, 0.05, leaf.shape)
        return jnp.asarray(np.asarray(leaf) + moves.astype(np.float32))

    return frozen, tree.map_with_path(moved, trainable)


@pytest.mark.parametrize(
    ("kind", "format"),
    [
        *((kind, "nf4") for kind in KINDS if kind != "few"),
        ("few", "int8"),
        pytest.param("plain", "int8", marks=pytest.mark.slow),
    ],
)
def test_the_packed_sum_is_what_training_saw(kind, format):
    params = lora.combine(*adapted(rounded(kind, format), kind))
    merged = lora.merge(params)
    copies = tuple(KINDS[kind].get("modules_to_save", ()))  # take the kernels' place as they are
    packed = [
        leaf
        for path, leaf in tree.flatten(merged).items()
        if is_packed(path, kind) and path.split("/")[-2] not in copies
    ]
    assert packed and not any(isinstance(leaf, Rounded) for leaf in packed) and all(map(quant.is_packed, packed))
    np.testing.assert_allclose(MODEL(params, TOKENS), MODEL(merged, TOKENS), atol=1e-5)
    # Beside a packed base the same adapter computes something else: packing the sum moves the weights.
    beside = lora.overlay(packed_base(kind, format), lora.adapter_leaves(params))
    assert np.abs(MODEL(beside, TOKENS) - MODEL(params, TOKENS)).max() > 1e-3


def test_without_an_adapter_it_is_the_packed_base():
    np.testing.assert_allclose(MODEL(rounded(), TOKENS), MODEL(packed_base(), TOKENS), atol=1e-6)


@pytest.mark.parametrize("kind", ["few", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("plain", "dora"))])
def test_gradients_are_those_of_the_sum_at_the_packed_weights(kind):
    frozen, trainable = adapted(rounded(kind), kind)

    def loss(trainable):
        return jnp.sum(jnp.sin(MODEL(lora.combine(frozen, trainable), TOKENS)))

    def kernels_of(trainable):
        return {
            path: lora.merged_leaf(tree.subtree(lora.combine(frozen, trainable), path), "kernel")
            for path in {path.rpartition("/")[0] for path in tree.flatten(trainable)}
        }

    def loss_of_kernels(kernels):
        flat = {path: leaf for path, leaf in tree.flatten(frozen).items() if not lora.is_adapter(path)}
        return jnp.sum(jnp.sin(MODEL(tree.unflatten(flat | {f"{p}/kernel": k for p, k in kernels.items()}), TOKENS)))

    @jax.jit
    def by_the_kernels(trainable):
        whole, pull = jax.vjp(kernels_of, trainable)
        at = {path: quant.dequantize(quant.quantize(kernel)) for path, kernel in whole.items()}
        (gradient,) = pull(jax.grad(loss_of_kernels)(at))
        return gradient

    expected, found = by_the_kernels(trainable), jax.jit(jax.grad(loss))(trainable)
    for path, leaf in tree.flatten(expected).items():
        np.testing.assert_allclose(tree.flatten(found)[path], leaf, atol=2e-4 * np.abs(leaf).max(), err_msg=path)


def test_a_folder_holds_the_packed_sum_unpacked(tmp_path):
    params = lora.combine(*adapted(rounded(), "plain"))
    hub.save_model(tmp_path / "out", MODEL, params)
    _, loaded = hub.load(tmp_path / "out", dtype="float32")
    loaded = tree.flatten(loaded)
    for path, leaf in tree.flatten(lora.merge(params)).items():
        np.testing.assert_array_equal(loaded[path], quant.unpacked(leaf), err_msg=path)


def test_what_a_kernel_packed_with_its_update_cannot_do_is_said():
    dropping = lora.init(rounded(), jlora.LoraConfig(r=2, lora_dropout=0.1), jax.random.key(0))
    with pytest.raises(ValueError, match="cannot have lora_dropout"):
        MODEL.hidden(dropping, TOKENS, key=jax.random.key(0))
    with pytest.raises(ValueError, match="is packed only when it is used"):
        hub.save_quantized("never-written", MODEL, rounded())
