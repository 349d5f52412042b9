"""What the compiled step moves between devices, read from the program."""

import functools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from jlora import lora, models, quant, sharding, tree
from jlora.optim import OptimConfig, make_optimizer
from jlora.train.algorithms import sft
from jlora.train.state import create_state
from jlora.train.step import make_step

ROWS, TOKENS, WIDTH, INNER, VOCABULARY, RANK = 8, 48, 256, 512, 1088, 3
COLUMNS = 16  # of a chunk of the loss: 32 tokens a device, on four of them, over eight rows
KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
CONFIGS = {
    "llama": dict(
        model_type="llama",
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_attention_heads=8,
        num_key_value_heads=4,
        rms_norm_eps=1e-5,
        hidden_act="silu",
        max_position_embeddings=TOKENS,
        tie_word_embeddings=False,
    ),
    "gpt2": dict(model_type="gpt2", n_embd=WIDTH, n_inner=INNER, n_head=8, n_positions=TOKENS),
    "gpt_neox": dict(
        model_type="gpt_neox",
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_attention_heads=8,
        max_position_embeddings=TOKENS,
        layer_norm_eps=1e-5,
    ),
}
CONFIGS["mixtral"] = CONFIGS["llama"] | dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2)


class Moved(NamedTuple):
    """One result of a collective: what is done, the array's dtype and shape, and where in the model."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    where: str

    @property
    def size(self):
        return math.prod(self.shape)


def collectives(text):
    """Every collective of a compiled program, as often as it stands there: a loop's body counts once."""
    found = []
    for line in text.splitlines():
        if call := re.search(rf"= (.*?) ({KINDS})(-start)?\(", line):
            name = re.search(r'op_name="([^"]*)"', line)
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", call[1]):
                shape = tuple(int(size) for size in dims.split(",") if size)
                found.append(Moved(call[2], dtype, shape, name[1] if name else ""))
    return found


@functools.cache
def compiled(family, **mesh):
    """(the compiled step of a small model on a mesh, its arguments, what it moves); each is compiled once."""
    step, arguments = case(family, **mesh)
    program = step.lower(*arguments).compile()
    return program, arguments, collectives(program.as_text())


def case(family, devices=None, **mesh):
    """(step, its arguments). With devices that are not here the arguments are shapes."""
    sizes = sharding.MeshConfig(**mesh)
    here = sharding.make_mesh(sizes, jax.devices()[: math.prod(sizes.sizes)])
    layers = "n_layer" if family == "gpt2" else "num_hidden_layers"
    model = models.build(CONFIGS[family] | {layers: 2, "vocab_size": VOCABULARY})
    params = jax.jit(model.random_params)(jax.random.key(0))
    stack = model.config.names.stack
    params = tree.map_with_path(
        lambda path, leaf: quant.quantize(leaf) if path.startswith(stack) and path.endswith("kernel") else leaf, params
    )
    experts = ("experts.gate_up_proj", "experts.down_proj") if family == "mixtral" else None
    targets = {"target_modules": "all-linear", "target_parameters": experts}
    settings = lora.LoraConfig(r=RANK, init_lora_weights=False, **targets)
    params = lora.init(params, settings, jax.random.key(1))
    frozen, trainable = (sharding.shard(half, here) for half in lora.split(params))
    optimizer = make_optimizer(OptimConfig(), 10)
    state = create_state(trainable, optimizer, 0, here)
    rng = np.random.default_rng(0)
    shape = (1, ROWS, TOKENS)
    batch = {
        "tokens": rng.integers(0, VOCABULARY, shape, np.int32),
        "targets": rng.integers(0, VOCABULARY, shape, np.int32),
        "positions": np.broadcast_to(np.arange(TOKENS, dtype=np.int32), shape),
        "segment_ids": np.ones(shape, np.int32),
        "weights": (rng.random(shape) < 0.7).astype(np.float32),
    }
    arguments = state, frozen, sharding.put_batch(batch, here)
    if devices is not None:
        there = sharding.make_mesh(sizes, devices)

        def shape_of(leaf):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.NamedSharding(there, leaf.sharding.spec))

        arguments = jax.tree.map(shape_of, arguments)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, arguments[0])
    return make_step(sft.sft_loss(model, chunk=COLUMNS * ROWS // 4), optimizer, shardings), arguments


def in_layers(moved):
    return "Block" in moved.where or "dynamic_index_in_dim" in moved.where  # a layer's leaves are taken from the stack


def is_adapters(moved):
    return RANK in moved.shape


@pytest.mark.parametrize(
    ("family", "mesh"),
    [
        pytest.param("llama", {"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
        ("llama", {"fsdp": 2, "sequence": 2}),
        ("gpt2", {"tensor": 2}),
        ("gpt_neox", {"tensor": 2}),
        pytest.param("mixtral", {"fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_mesh_changes_no_number(family, mesh):
    """Loss and gradients, which after one step are in the first moments."""
    found = []
    for chosen in ({}, mesh):
        program, arguments, _ = compiled(family, **chosen)
        state, metrics = program(*jax.tree.map(jnp.copy, arguments))
        found.append((state.trainable, [metrics[name] for name in ("loss", "grad_norm", "weight")]))
    for one, spread in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(spread, one, rtol=1e-4, atol=1e-6)


def test_fsdp_gathers_codes_and_never_a_weight_or_an_activation():
    check_gathers(compiled("llama", fsdp=4)[2])


@pytest.mark.slow
def test_on_tpus_too(monkeypatch):
    pytest.importorskip("libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    step, arguments = case("llama", devices=list(devices), data=2, fsdp=4)
    # The least effort compiles several times faster, and leaves gathers whole.
    program = step.lower(*arguments).compile(compiler_options={"exec_time_optimization_effort": -1.0})
    check_gathers(collectives(program.as_text()))


def check_gathers(found):
    layers = [moved for moved in found if in_layers(moved)]
    codes = [moved for moved in layers if moved.dtype == "u8"]
    kernels = {(WIDTH, WIDTH): 2, (WIDTH, WIDTH // 2): 2, (WIDTH, INNER): 2, (INNER, WIDTH): 1}
    for (inputs, outputs), count in kernels.items():
        gathers = [moved for moved in codes if moved.shape == (1, inputs // 2, outputs)]
        assert len(gathers) == 2 * count, (inputs, outputs)  # forward; once for recomputation and backward together
        assert {moved.kind for moved in gathers} == {"all-gather"}
    # What else moves in the layers are adapters and their gradients.
    assert [moved for moved in layers if moved.dtype != "u8" and RANK not in moved.shape] == []


@pytest.mark.parametrize("mesh", [{"fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_the_loss_moves_hidden_states_a_chunk_at_a_time_and_not_the_head(mesh):
    rows, columns = ROWS // mesh.get("data", 1), COLUMNS * math.prod(mesh.values()) // 4
    found = [moved for moved in compiled("llama", **mesh)[2] if not in_layers(moved) and RANK not in moved.shape]
    large = [moved for moved in found if WIDTH in moved.shape]
    embedded, *chunks = sorted(large, key=lambda moved: "Embed" not in moved.where)
    assert embedded.size == rows * TOKENS * WIDTH
    # Hidden states and their gradients. What else there is has a number for each of a chunk's tokens.
    assert [moved.size for moved in chunks] == [rows * columns * WIDTH] * 2
    assert all(moved.size <= rows * TOKENS for moved in found if moved not in large)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_tensor_parallelism_moves_activations_and_gradients_of_adapters(family):
    found = [moved for moved in compiled(family, tensor=2)[2] if moved.size > 1]
    assert not [moved for moved in found if moved.dtype == "u8"]
    # A fused c_attn [B, T, 3·D] is split into queries, keys and values, which lie otherwise.
    rest = [moved for moved in found if not (family == "gpt2" and "_split" in moved.where)]
    assert {moved.kind for moved in rest} == {"all-reduce"}
    layers = [moved for moved in rest if in_layers(moved) and RANK not in moved.shape]
    assert {moved.size for moved in layers} == {ROWS * TOKENS * WIDTH}
    assert len([moved for moved in layers if "transpose" not in moved.where]) == 2  # after attention and after the MLP


def test_tokens_change_places_with_heads_and_are_gathered_nowhere():
    layers = [moved for moved in compiled("llama", fsdp=2, sequence=2)[2] if in_layers(moved)]
    moved = [moved for moved in layers if moved.dtype == "f32" and RANK not in moved.shape]
    assert {each.kind for each in moved} == {"all-to-all"}
    heads = 8 + 4 + 4 + 8  # of queries, keys, values and the output
    own = ROWS // 2 * TOKENS // 2 * heads * WIDTH // 8
    assert sum(each.size for each in moved) == 3 * own  # forward, recomputation, backward


def test_tokens_go_to_experts_where_they_are():
    found = [moved for moved in compiled("mixtral", fsdp=2, tensor=2)[2] if moved.size > 1]
    assert [moved for moved in found if "sort" in moved.where or "top_k" in moved.where] == []
    # Each device has two choices of an expert for each of its own tokens, and never those of all tokens.
    assert [moved for moved in found if 2 * ROWS * TOKENS in moved.shape] == []


def test_what_does_not_divide_is_whole_and_right():
    """A vocabulary that fsdp does not divide, and heads of keys that tensor does not."""
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 33, "num_hidden_layers": 1}
    model = models.build(CONFIGS["llama"] | sizes)
    params = jax.jit(model.random_params)(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (4, 8), 0, 33)
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4, tensor=2))
    np.testing.assert_allclose(model(sharding.shard(params, mesh), tokens), model(params, tokens), rtol=1e-4, atol=1e-5)
