"""Mamba-2 mixers by themselves, over rows of several chunks, with transformers' as the judge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer

import jlora
from jlora import models, sharding, tree
from jlora.errors import UserError
from jlora.kernels.attention import Marks
from jlora.kernels.recurrence import Runs
from jlora.models.context import Context
from jlora.models.mamba import Mamba
from jlora.train.reporting import usage
from jlora.types import BRANCH

TOKENS = 150
FIELDS = dict(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=20,
    shared_intermediate_size=28,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_local_experts=0,
    mamba_n_heads=6,
    mamba_n_groups=2,
    mamba_d_state=10,
    mamba_d_head=8,
    mamba_chunk_size=32,
    time_step_limit=(0.3, 2.0),
)


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    layer = GraniteMoeHybridMambaLayer(transformers.GraniteMoeHybridConfig(**FIELDS), layer_idx=0).eval()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_((name == "norm.weight") + 0.4 * torch.randn_like(parameter))
    return layer


@pytest.fixture(scope="module")
def config():
    return models.build(transformers.GraniteMoeHybridConfig(**FIELDS).to_dict()).config


def leaves_of(layer):
    """jlora's leaves from transformers' tensors, or from their gradients."""
    value = {name: jnp.asarray(tensor.numpy()) for name, tensor in layer.items()}
    return {
        "in_proj": {"kernel": value["in_proj.weight"].T},
        "out_proj": {"kernel": value["out_proj.weight"].T},
        "conv1d": {"filter": value["conv1d.weight"].T, "bias": value["conv1d.bias"]},
        "norm": {"scale": value["norm.weight"]},
        **{name: {"value": value[name]} for name in ("A_log", "D", "dt_bias")},
    }


def run(config, leaves, x, segments=None):
    segments = jnp.ones(x.shape[:2], jnp.int32) if segments is None else jnp.asarray(segments)
    marks = Marks(segments, segments, segments, segments)  # which no mixer but attention looks at
    context = Context(None, None, marks, jnp.int32(0), jnp.int32(0), Runs.of(segments))
    return Mamba(config, config.layers[0]).apply({"params": leaves}, x, context, None)[0]


def inputs(seed=0, batch=2):
    return np.random.default_rng(seed).normal(size=(batch, TOKENS, FIELDS["hidden_size"])).astype(np.float32)


def test_outputs_and_gradients_over_several_chunks(theirs, config):
    x, weights = inputs(), inputs(seed=1)
    tensor = torch.tensor(x, requires_grad=True)
    expected = theirs(tensor)
    (expected * torch.tensor(weights)).sum().backward()
    leaves = leaves_of({name: parameter.detach() for name, parameter in theirs.named_parameters()})
    y, pull = jax.jit(lambda *arrays: jax.vjp(lambda *arrays: run(config, *arrays), *arrays))(leaves, x)
    expected = expected.detach().numpy()
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())
    wanted = leaves_of({name: parameter.grad for name, parameter in theirs.named_parameters()}), tensor.grad.numpy()
    for found, gradient in zip(jax.tree.leaves(pull(jnp.asarray(weights))), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(found, gradient, atol=5e-5 * np.abs(gradient).max())


def test_documents_end_and_branches_continue(theirs, config):
    """Padding, two documents, and two answers to a shared prompt: each as if alone, whatever the neighbours hold."""
    ids = np.array([[0] * 2 + [1] * 41 + [2] * 20 + [2 + BRANCH] * 30 + [2 + 2 * BRANCH] * 50 + [0] * 7])
    leaves = leaves_of({name: parameter.detach() for name, parameter in theirs.named_parameters()})
    packed = jax.jit(lambda x: run(config, leaves, x, ids))
    x = inputs(batch=1)
    found = packed(x)
    for segment in (1, 2 + BRANCH, 2 + 2 * BRANCH):
        own = ids[0] == segment
        seen = own | (ids[0] == segment % BRANCH)
        with torch.no_grad():
            expected = theirs(torch.tensor(x[:, seen]))[:, own[seen]].numpy()
        np.testing.assert_allclose(found[:, own], expected, atol=1e-5 * np.abs(expected).max())
        others = np.where(seen[None, :, None], x, inputs(seed=2, batch=1))
        np.testing.assert_array_equal(packed(others)[:, own], found[:, own])


def test_a_mesh_changes_nothing():
    """With one group, whose keys every device has, and heads on several."""
    model = models.build(transformers.GraniteMoeHybridConfig(**FIELDS | dict(mamba_n_groups=1)).to_dict())
    params = jax.jit(model.random_params)(jax.random.key(0))
    tokens = np.arange(2 * 40, dtype=np.int32).reshape(2, 40) % 61
    expected = model(params, tokens)
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    with sharding.on(mesh):
        found = model(sharding.shard(params, mesh), tokens)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_only_linears_are_packed(tmp_path):
    torch.manual_seed(0)
    transformers.GraniteMoeHybridForCausalLM(transformers.GraniteMoeHybridConfig(**FIELDS)).save_pretrained(tmp_path)
    _, params = jlora.load(tmp_path, quant="nf4")
    mixer = tree.flatten(params["layers"]["mamba"])
    packed = {path for path, leaf in mixer.items() if not isinstance(leaf, jax.Array)}
    assert packed == {"in_proj/kernel", "out_proj/kernel"}
    assert {"A_log/value", "D/value", "dt_bias/value", "conv1d/filter", "conv1d/bias"} < mixer.keys()


def test_work_does_not_grow_with_the_length(config):
    """Every layer writes its state once for a token and reads it once, and once more for each gradient."""
    model = models.Model(config)
    params = model.abstract_params()
    found = {usage.flops_per_token(config, params, {}, length) for length in (64, 4096)}
    weights = sum(leaf.size for path, leaf in tree.flatten(params).items() if path.endswith("kernel"))
    assert found == {4 * weights + 6 * 2 * 2 * 6 * 10 * 8}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(mamba_n_heads=5), "mamba_n_heads 5 × mamba_d_head 8 is not 48, the width of the mixers"),
        (dict(mamba_n_groups=4), "6 Mamba heads are not a multiple of 4 groups"),
        (dict(mamba_d_conv=1), "a Mamba convolution of 1 token is not supported"),
        (dict(time_step_limit=[0.1]), r"time_step_limit is \[0\.1\], expected a list of two numbers from 0"),
        (dict(position_embedding_type="alibi"), "position_embedding_type 'alibi' is not supported"),
        (dict(layer_types=["mamba", "rwkv"]), "layer_types: rwkv is not supported"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    fields = transformers.GraniteMoeHybridConfig(**FIELDS).to_dict()
    with pytest.raises(UserError, match=message):
        models.build(fields | change)
