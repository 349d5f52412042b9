"""The types of tensors in each kind of file; with -m slow, `llama-quantize`'s own code on the same models is the judge.

The expectations here were taken from files that it wrote (November 2026).
"""

import warnings

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import hub, models
from jlora.hub.gguf import kquants
from jlora.hub.gguf.mixtures import BLOCKS, FILE_TYPES, PLAIN, types_of

PACKED = [name for name, file in FILE_TYPES.items() if file.type not in PLAIN]


def llama(layers=10, *, tied=False, experts=0, groups=2, columns=256):
    """(shapes by name, metadata) of a file."""
    matrices = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (columns, columns))
    ends = "_exps" if experts else ""
    matrices |= {f"ffn_{name}{ends}": (*[experts][:experts], 512, columns) for name in ("gate", "up", "down")}
    vectors = {"attn_norm": (columns,), "ffn_norm": (columns,)} | (
        {"ffn_gate_inp": (experts, columns)} if experts else {}
    )
    shapes = {"token_embd.weight": (64, columns), "output_norm.weight": (columns,), "attn_q.bias": (2, columns)}
    shapes |= {} if tied else {"output.weight": (64, columns)}
    for layer in reversed(range(layers)):  # a file's order does not count
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in (matrices | vectors).items()}
    sizes = {
        "block_count": layers,
        "attention.head_count": 8,
        "attention.head_count_kv": groups,
        "expert_count": experts,
    }
    return shapes, {"general.architecture": "any"} | {f"any.{key}": n for key, n in sizes.items()}


def by_module(types, module):
    """The types of the layers' modules, in order."""
    found = {int(name.split(".")[1]): type for name, type in types.items() if f".{module}." in name}
    return [found[layer] for layer in sorted(found)]


def raised(types, module, usual):
    """Layer → type, of those layers whose module has another type than the usual."""
    return {layer: type for layer, type in enumerate(by_module(types, module)) if type != usual}


# The first eighth of ten layers is one, the last begins at the eighth.
UNEVEN = dict.fromkeys((0, 3, 6, 8, 9), "Q6_K")
ALL = range(10)


@pytest.mark.parametrize(
    ("dtype", "usual", "values", "down", "output"),
    [
        ("q8_0", "Q8_0", {}, {}, {}),
        ("q6_k", "Q6_K", {}, {}, {}),
        ("q5_k_m", "Q5_K", UNEVEN, UNEVEN, {}),
        ("q5_k_s", "Q5_K", {}, {}, {}),
        ("q5_0", "Q5_0", {}, {}, {}),
        ("q4_k_m", "Q4_K", UNEVEN, UNEVEN, {}),
        ("q4_k_s", "Q4_K", dict.fromkeys(range(4), "Q5_K"), {0: "Q5_K"}, {}),
        ("q4_0", "Q4_0", {}, {}, {}),
        ("q3_k_l", "Q3_K", *[dict.fromkeys(ALL, "Q5_K")] * 3),
        (
            *("q3_k_m", "Q3_K", dict.fromkeys(ALL, "Q4_K") | dict.fromkeys(range(2), "Q5_K")),
            *[dict.fromkeys(ALL, "Q4_K")] * 2,
        ),
        ("q3_k_s", "Q3_K", {}, {}, {}),
        ("q2_k", "Q2_K", dict.fromkeys(ALL, "Q4_K"), *[dict.fromkeys(ALL, "Q3_K")] * 2),
    ],
)
def test_which_matrices_get_more_bits(dtype, usual, values, down, output):
    types = types_of(*llama(), dtype)
    found = [raised(types, module, usual) for module in ("attn_v", "ffn_down", "attn_output")]
    assert found == [values, down, output]
    for module in ("attn_q", "attn_k", "ffn_gate", "ffn_up"):
        assert by_module(types, module) == [usual] * 10
    assert types["token_embd.weight"] == usual
    head = "Q8_0" if dtype == "q8_0" else "Q6_K"
    assert types["output.weight"] == head
    assert types_of(*llama(tied=True), dtype)["token_embd.weight"] == head
    for name in ("output_norm.weight", "blk.3.attn_norm.weight", "attn_q.bias"):
        assert types[name] == "F32"


def test_numbers_and_sizes_are_ggufs():
    for name, file in FILE_TYPES.items():
        assert gguf.LlamaFileType(file.number).name.lower() in (f"mostly_{name}", f"all_{name}")
        if file.type not in PLAIN:
            assert BLOCKS[file.type] == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[file.type]][0]
    sizes = {type: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]][1] for type in kquants.KINDS}
    assert {type: kind.nbytes for type, kind in kquants.KINDS.items()} == sizes


def test_layers_count_by_number():
    """Not by the names' order; and with experts, two MLPs of a layer are one."""
    expected = dict.fromkeys((0, 3, 6, 9, 10, 11), "Q6_K")
    assert raised(types_of(*llama(12), "q4_k_m"), "ffn_down", "Q4_K") == expected
    shapes, metadata = llama(12, experts=5)
    shared = {name.replace("_exps", "_shexp"): shape[1:] for name, shape in shapes.items() if "_exps" in name}
    types = types_of(shapes | shared, metadata, "q4_k_m")
    for module in ("ffn_down_exps", "ffn_down_shexp"):
        assert raised(types, module, "Q4_K") == expected


def test_values_that_few_queries_share_get_fewer_bits():
    assert by_module(types_of(*llama(groups=4), "q2_k"), "attn_v") == ["Q3_K"] * 10


def test_eight_experts():
    types = types_of(*llama(experts=8), "q4_k_m")
    assert by_module(types, "attn_k") == by_module(types, "attn_v") == ["Q8_0"] * 10
    assert by_module(types, "attn_output") == ["Q5_K"] * 10
    assert raised(types, "ffn_down_exps", "Q4_K") == UNEVEN
    assert by_module(types, "ffn_gate_inp") == ["F32"] * 10
    assert by_module(types_of(*llama(experts=8), "q3_k_l"), "attn_output") == ["Q3_K"] * 10
    assert by_module(types_of(*llama(experts=5), "q4_k_m"), "attn_output") == ["Q4_K"] * 10


@pytest.mark.parametrize(("groups", "values"), [(1, "Q5_K"), (8, "Q4_K")])
def test_values_of_70b(groups, values):
    types = by_module(types_of(*llama(80, groups=groups), "q4_k_m"), "attn_v")
    assert {*types} == {values, "Q6_K"} and types.count("Q6_K") == 40


def test_rows_that_are_not_made_of_whole_blocks():
    """Instead of K-quants: blocks of 32, or float16."""
    types = types_of(*llama(columns=96), "q4_k_m")
    assert {*by_module(types, "attn_q")} == {"Q5_0"} and {*by_module(types, "attn_v")} == {"Q5_0", "Q8_0"}
    assert types["output.weight"] == "Q8_0"
    for dtype, instead in {"q2_k": "Q4_0", "q3_k_s": "Q4_0", "q5_k_s": "Q5_1", "q6_k": "Q8_0", "q4_0": "Q4_0"}.items():
        assert by_module(types_of(*llama(columns=96), dtype), "attn_q")[0] == instead
    assert {*types_of(*llama(columns=80), "q4_k_m").values()} == {"F16", "F32"}


# Larger than those of test_families.py: rows of whole blocks of 256 for K-quants, and an eighth of the layers is one.
SIZES = dict(
    vocab_size=64,
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=9,
    num_attention_heads=4,
    num_key_value_heads=1,
    max_position_embeddings=64,
)
EXPERTS = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=256, norm_topk_prob=True)
DELTA = SIZES | dict(
    head_dim=64,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=64,
    linear_value_head_dim=64,
    linear_conv_kernel_dim=3,
    partial_rotary_factor=0.5,
)
LATENT = SIZES | dict(
    num_key_value_heads=4,
    kv_lora_rank=256,
    q_lora_rank=256,
    qk_nope_head_dim=64,
    qk_rope_head_dim=64,
    v_head_dim=64,
    moe_intermediate_size=256,
    num_experts_per_tok=3,
    routed_scaling_factor=1.7,
    n_routed_experts=5,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=2,
)
MODELS = {
    "tied": SIZES | dict(model_type="llama", tie_word_embeddings=True),
    "untied": SIZES | dict(model_type="llama", num_key_value_heads=4),
    "70B": SIZES | dict(model_type="llama", num_hidden_layers=80),
    "rows of 96": SIZES | dict(model_type="llama", hidden_size=96, intermediate_size=288, num_attention_heads=3),
    "eight experts": SIZES | dict(model_type="mixtral", num_local_experts=8, num_experts_per_tok=2),
    "qwen3_moe": SIZES | EXPERTS | dict(model_type="qwen3_moe", head_dim=64),
    "qwen3_next": DELTA | EXPERTS | dict(model_type="qwen3_next", shared_expert_intermediate_size=256),
    "phi3": SIZES | dict(model_type="phi3", pad_token_id=0),
    "gpt2": dict(model_type="gpt2", vocab_size=64, n_embd=256, n_layer=9, n_head=4, n_positions=64),
    "gpt_oss": SIZES | dict(model_type="gpt_oss", num_local_experts=8, num_experts_per_tok=2, head_dim=64),
    "lfm2": SIZES
    | dict(
        model_type="lfm2", layer_types=["conv", "conv", "full_attention"] * 3, block_multiple_of=256, conv_L_cache=4
    ),
    "deepseek_v3": LATENT | dict(model_type="deepseek_v3"),
    "gemma4": SIZES
    | dict(model_type="gemma4_text", head_dim=64, global_head_dim=64, sliding_window=6, pad_token_id=0)
    | dict(final_logit_softcapping=3.0, hidden_size_per_layer_input=256, vocab_size_per_layer_input=64),
}


def file_types(path):
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_llama_quantize_gives_the_same_types(name, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
    model = models.build(MODELS[name])
    params = jax.jit(model.random_params)(jax.random.key(0))
    with warnings.catch_warnings(action="ignore"):  # windows that llama.cpp does not compute
        hub.save_gguf(tmp_path / "whole.gguf", model, params, dtype="f32")
    given = file_types(tmp_path / "whole.gguf")
    for dtype in PACKED:
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype = FILE_TYPES[dtype].number
        paths = [str(tmp_path / file).encode() for file in ("whole.gguf", "theirs.gguf")]
        assert llama_cpp.llama_model_quantize(*paths, settings) == 0
        with warnings.catch_warnings(action="ignore"):
            hub.save_gguf(tmp_path / "ours.gguf", model, params, dtype=dtype)
        theirs, ours = file_types(tmp_path / "theirs.gguf"), file_types(tmp_path / "ours.gguf")
        # What is not packed stays as it was given: F32 here, as a rule F16.
        apart = {"per_layer_model_proj.weight"}
        assert {name: ours[name] for name in given if name not in apart} == {
            name: theirs[name] for name in given if name not in apart
        }
        fields = gguf.GGUFReader(tmp_path / "theirs.gguf").fields, gguf.GGUFReader(tmp_path / "ours.gguf").fields
        for key in ("general.file_type", "general.quantization_version"):
            assert fields[0][key].contents() == fields[1][key].contents()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", PACKED)
def test_llama_cpp_computes_with_the_packed_weights(dtype, tmp_path, llama_cpp):
    """But for its products, whose other factors it rounds to 8 bits; the unpacked model's results are further off."""
    model = models.build(MODELS["untied"] | dict(intermediate_size=512, num_hidden_layers=2))
    params = jax.jit(model.random_params)(jax.random.key(0))
    hub.save_gguf(tmp_path / "model.gguf", model, params, dtype=dtype)
    tokens = np.arange(1, 20)[None] * 7 % 64
    opened = llama_cpp(tmp_path / "model.gguf")
    opened.eval(tokens[0].tolist())
    found = np.array(opened.scores[: tokens.shape[1]])
    expected, whole = (
        model(params, jnp.asarray(tokens))[0] for params in (jlora.load(tmp_path / "model.gguf")[1], params)
    )
    errors = [np.linalg.norm(found - np.asarray(other)) / np.linalg.norm(found) for other in (expected, whole)]
    assert errors[0] < 0.04 and (dtype == "q8_0" or errors[0] < errors[1] / 2)
