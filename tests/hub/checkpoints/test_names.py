"""The Hub's names: transformers' own state dict is the judge."""

import pytest

from jlora.hub.checkpoints import names

SHAPES = {
    "embed_tokens/embedding": (101, 48),
    "layers/input_layernorm/scale": (3, 48),
    "layers/post_attention_layernorm/scale": (3, 48),
    "layers/self_attn/q_proj/kernel": (3, 48, 60),
    "layers/self_attn/k_proj/kernel": (3, 48, 20),
    "layers/self_attn/v_proj/kernel": (3, 48, 20),
    "layers/self_attn/o_proj/kernel": (3, 60, 48),
    "layers/self_attn/q_proj/bias": (3, 60),
    "layers/self_attn/k_proj/bias": (3, 20),
    "layers/self_attn/v_proj/bias": (3, 20),
    "layers/self_attn/o_proj/bias": (3, 48),
    "layers/mlp/gate_proj/kernel": (3, 48, 80),
    "layers/mlp/up_proj/kernel": (3, 48, 80),
    "layers/mlp/down_proj/kernel": (3, 80, 48),
    "norm/scale": (48,),
    "lm_head/kernel": (48, 101),
}


def test_every_tensor_of_transformers_has_one_leaf(make_llama):
    model = make_llama(attention_bias=True)
    found = {t.name: t.shape for path, shape in SHAPES.items() for t in names.hub_tensors(path, shape)}
    assert found == {name: tuple(value.shape) for name, value in model.state_dict().items()}


def test_only_kernels_are_transposed():
    transposed = {path for path, shape in SHAPES.items() if names.hub_tensors(path, shape)[0].transposed}
    assert transposed == {path for path in SHAPES if path.endswith("/kernel")}


@pytest.mark.parametrize("stack", ["h", "h@1-1"])
def test_gpt2_stores_its_linears_untransposed(stack):
    (tensor,) = names.hub_tensors(f"{stack}/mlp/c_fc/kernel", (1, 4, 6))
    assert (tensor.shape, tensor.transposed) == ((4, 6), False)


def test_layers_keep_their_order():
    found = [t.name for t in names.hub_tensors("layers/mlp/up_proj/kernel", (12, 4, 6))]
    assert found == [f"model.layers.{i}.mlp.up_proj.weight" for i in range(12)]


def test_module_names():
    assert names.module_names("layers/self_attn/q_proj", 2) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    assert names.module_names("lm_head", 48) == ["lm_head"]


@pytest.mark.parametrize("path", ["layers/self_attn/q_proj/lora_a", "encoder/kernel"])
def test_a_leaf_without_a_name_is_an_error(path):
    with pytest.raises(ValueError, match="has no name on the Hub"):
        names.hub_tensors(path, (3, 4, 5))


def test_harmless_tensors():
    assert names.is_harmless("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert not names.is_harmless("lm_head.weight")  # what it holds decides (jlora.hub.checkpoints.tied)
    assert not names.is_harmless("model.layers.0.self_attn.q_norm.weight")


def test_gguf_names_agree_with_the_gguf_package():
    gguf = pytest.importorskip("gguf")
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    hub = {t.name for path, shape in SHAPES.items() for t in names.hub_tensors(path, shape)}
    weights = {table.get_name(name, try_suffixes=(".weight", ".bias")): name for name in hub}
    assert {there.names: name for name, there in names.from_gguf(weights).items()} == {
        (weight,): name for weight, name in weights.items()
    }
    assert len(weights) == len(hub)
    assert names.from_gguf(["rope_freqs.weight", "blk.0.attn_sinks.weight"]) == {}
