"""Score heads of reward models, with transformers' sequence classifiers and PEFT's adapters of them as judges.

Here with a few families; `test_score_head` of tests/models/test_families.py has one case of each.
"""

import copy
import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from jlora import hub, lora, models, quant, sharding, tree
from jlora.hub.checkpoints.older import for_every_reader

TOKENS = np.array([[1, 5, 9, 100, 7, 3, 2], [4, 8, 15, 16, 23, 42, 99]], np.int32)
SIZES = dict(
    vocab_size=101, hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=3, eos_token_id=6
)
GPT_SIZES = dict(vocab_size=101, n_embd=48, n_layer=2, n_head=3, n_positions=64, eos_token_id=6, bos_token_id=1)
VISION = dict(
    hidden_size=20, intermediate_size=28, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
# (transformers' config class, its fields, linears to adapt)
CASES = {
    "llama": ("LlamaConfig", SIZES | dict(num_key_value_heads=1, head_dim=20), ["q_proj", "down_proj"]),
    "llama, tied": ("LlamaConfig", SIZES | dict(tie_word_embeddings=True), ["v_proj", "up_proj"]),
    "qwen2, tied": ("Qwen2Config", SIZES | dict(num_key_value_heads=3, tie_word_embeddings=True), ["k_proj"]),
    "qwen3": ("Qwen3Config", SIZES | dict(num_key_value_heads=1, head_dim=10), ["o_proj", "gate_proj"]),
    "gemma3": (
        "Gemma3Config",
        dict(text_config=SIZES | dict(num_key_value_heads=1, head_dim=10), vision_config=VISION, eos_token_id=6),
        ["o_proj", "up_proj"],  # the tower has no linears of these names, which PEFT would adapt too
    ),
    "gpt2": ("GPT2Config", GPT_SIZES, ["c_attn", "c_fc"]),
    "gpt_neox": ("GPTNeoXConfig", SIZES | dict(bos_token_id=1), ["query_key_value"]),
}
PACKED = quant.QuantConfig(rules=((r"layers/.*/(q_proj|down_proj)/kernel", "nf4"),))
FAMILIES = pytest.mark.parametrize("case", CASES)


def randomise(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("score.weight", "score.modules_to_save.default.weight")) or ".lora_" in name:
                parameter.copy_(0.5 * torch.randn_like(parameter))
            elif parameter.requires_grad and not isinstance(model, peft.PeftModel):
                parameter.copy_((parameter.ndim == 1) + 0.2 * torch.randn_like(parameter))
    return model.eval()


def config_of(case, **changes):
    name, fields, _ = CASES[case]
    return getattr(transformers, name)(**copy.deepcopy(fields | changes))


@pytest.fixture
def save_base(tmp_path):
    """save_base(case) → folder of a language model."""

    def save(case):
        randomise(transformers.AutoModelForCausalLM.from_config(config_of(case))).save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return save


def make_classifier(case, labels=1, **changes):
    config = config_of(case, num_labels=labels, **changes)
    return randomise(transformers.AutoModelForSequenceClassification.from_config(config))


def open_classifier(folder, **settings):
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, **settings)


def open_peft(base, folder):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        return peft.PeftModel.from_pretrained(open_classifier(base, num_labels=1), folder).eval()


def make_peft(classifier, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return randomise(peft.get_peft_model(classifier, peft.LoraConfig(task_type="SEQ_CLS", r=3, **settings)))


def torch_scores(classifier):
    """At the last token, row by row: without a padding token transformers takes no batch."""
    with torch.no_grad():
        return np.concatenate([classifier(torch.tensor(row[None]).long()).logits.numpy()[:, 0] for row in TOKENS])


@functools.partial(jax.jit, static_argnums=0)
def scores(model, params):
    return model.score(params, model.hidden(params, jnp.asarray(TOKENS))[0][:, -1])


def with_adapter(model, params, targets, **settings):
    """The params with an adapter and a score head that both matter."""
    config = lora.LoraConfig(r=3, lora_alpha=7, target_modules=tuple(targets), init_lora_weights=False, **settings)
    params = model.add_score(lora.init(params, config, jax.random.key(0)), jax.random.key(1))
    grow = {"lora_b": 3.0, "trained_kernel": 30.0}
    frozen, trainable = lora.split(params)
    grown = tree.map_with_path(lambda path, leaf: leaf * grow.get(path.split("/")[-1], 1.0), trainable)
    return lora.combine(frozen, grown)


def assert_equal(found, expected):
    found, expected = tree.flatten(found), tree.flatten(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        for one, other in zip(jax.tree.leaves(found[path]), jax.tree.leaves(leaf), strict=True):
            np.testing.assert_array_equal(one, other, err_msg=path)


@FAMILIES
def test_a_reward_adapter_scores_the_same_in_peft(save_base, tmp_path, case):
    folder = save_base(case)
    model, params = hub.load(folder)
    params = with_adapter(model, params, CASES[case][2])
    hub.save_adapter(tmp_path / "adapter", params, base=str(folder))
    expected = scores(model, params)
    assert np.abs(expected - scores(model, lora.strip(params) | {"score": params["score"]})).max() > 1e-2
    np.testing.assert_allclose(torch_scores(open_peft(folder, tmp_path / "adapter")), expected, rtol=1e-5, atol=1e-5)
    assert_equal(hub.load_adapter(lora.strip(params), tmp_path / "adapter"), params)


@FAMILIES
def test_a_reward_adapter_of_peft_scores_the_same_here(save_base, tmp_path, case):
    folder = save_base(case)
    adapted = make_peft(open_classifier(folder, num_labels=1), target_modules=CASES[case][2])
    adapted.save_pretrained(tmp_path / "adapter")
    model, base = hub.load(folder)
    params = hub.load_adapter(base, tmp_path / "adapter")
    assert params["score"].keys() == {"trained_kernel"} and params["score"]["trained_kernel"].dtype == jnp.float32
    np.testing.assert_allclose(scores(model, params), torch_scores(adapted), rtol=1e-5, atol=1e-5)
    hub.save_adapter(tmp_path / "again", params, base=str(folder))
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("again", "adapter"))
    assert_equal(ours, theirs)


def test_the_folder_says_that_it_is_a_reward_model(save_base, tmp_path):
    folder = save_base("llama")
    model, params = hub.load(folder)
    params = with_adapter(model, params, ["q_proj"])
    for name in ("one", "two"):
        hub.save_adapter(tmp_path / name, params, base=str(folder))
        params = hub.load_adapter(lora.strip(params), tmp_path / name)
    files = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert files[0] == files[1]
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["score"]
    tensors = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert tensors["base_model.model.score.weight"].shape == (1, 48)
    card = (tmp_path / "one" / "README.md").read_text()
    namespace = {}
    code = card.split("```python")[1].split("```")[0].replace("path/to/this/folder", str(tmp_path / "one"))
    exec(code.replace("path/to/the/base", str(folder)), namespace)
    np.testing.assert_allclose(torch_scores(namespace["model"].eval()), scores(model, params), rtol=1e-5, atol=1e-5)


def test_a_head_by_itself_is_an_adapter_too(save_base, tmp_path):
    folder = save_base("llama")
    model, base = hub.load(folder)
    params = model.add_score(base, jax.random.key(1))
    hub.save_adapter(tmp_path / "adapter", params, base=str(folder))
    np.testing.assert_allclose(torch_scores(open_peft(folder, tmp_path / "adapter")), scores(model, params), atol=1e-5)
    assert_equal(hub.load_adapter(base, tmp_path / "adapter"), params)


def test_a_packed_and_placed_base(save_base, tmp_path):
    folder = save_base("llama")
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4, tensor=2))
    model, base = hub.load(folder, quant=PACKED, mesh=mesh)
    params = with_adapter(model, base, ["q_proj", "down_proj"])
    hub.save_adapter(tmp_path / "adapter", params)
    loaded = hub.load_adapter(base, tmp_path / "adapter")
    assert_equal(loaded, params)
    assert loaded["score"]["trained_kernel"].sharding.spec == jax.sharding.PartitionSpec("fsdp", None)
    hub.save_model(tmp_path / "merged", model, params)
    np.testing.assert_allclose(torch_scores(open_classifier(tmp_path / "merged")), scores(model, params), atol=1e-4)


@FAMILIES
def test_a_classifier_of_transformers_scores_the_same_here(tmp_path, case):
    classifier = make_classifier(case)
    classifier.save_pretrained(tmp_path / "reward")
    model, params = hub.load(tmp_path / "reward")
    assert params["score"].keys() == {"kernel"}
    np.testing.assert_allclose(scores(model, params), torch_scores(classifier), rtol=1e-5, atol=1e-5)
    if model.config.tie_word_embeddings:
        assert model(params, TOKENS).shape == (2, 7, 101)
    else:
        with pytest.raises(ValueError, match=r"(lm_head|embed_out)/kernel is not in these params"):
            model(params, TOKENS)
    hub.save_model(tmp_path / "again", model, params)
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("again", "reward")]
    assert_equal(*files)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("again", "reward")]
    expected = for_every_reader(configs[1])
    if "text_config" not in expected:  # there, a setting of the language model, which has one
        expected["pad_token_id"] = None
    assert configs[0] == expected


@FAMILIES
def test_a_merged_reward_model_scores_the_same_in_transformers(save_base, tmp_path, case):
    model, params = hub.load(save_base(case))
    params = with_adapter(model, params, CASES[case][2])
    expected = scores(model, params)
    for name, tree_of in {"adapted": params, "merged": lora.merge(params)}.items():
        hub.save_model(tmp_path / name, model, tree_of)
        np.testing.assert_allclose(torch_scores(open_classifier(tmp_path / name)), expected, rtol=1e-5, atol=2e-5)
        again, loaded = hub.load(tmp_path / name)
        np.testing.assert_allclose(scores(again, loaded), expected, rtol=1e-5, atol=2e-5)


def test_config_json_is_what_transformers_writes(save_base, tmp_path, byte_tokenizer):
    model, params = hub.load(save_base("qwen3"))
    hub.save_model(tmp_path / "reward", model, model.add_score(params), byte_tokenizer)
    written = json.loads((tmp_path / "reward" / "config.json").read_text())
    make_classifier("qwen3", pad_token_id=None).save_pretrained(tmp_path / "theirs")
    theirs = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert written == for_every_reader(theirs)
    assert "lm_head.weight" not in load_file(tmp_path / "reward" / "model.safetensors")
    try:
        byte_tokenizer.pad_token_id = model.config.vocab_size
        hub.save_model(tmp_path / "beyond", model, model.add_score(params), byte_tokenizer)
        byte_tokenizer.pad_token_id = 77
        hub.save_model(tmp_path / "reward", model, model.add_score(params), byte_tokenizer)
    finally:
        byte_tokenizer.pad_token = None
    assert json.loads((tmp_path / "reward" / "config.json").read_text())["pad_token_id"] == 77
    assert json.loads((tmp_path / "beyond" / "config.json").read_text())["pad_token_id"] is None


def test_batches_of_several_lengths(save_base, tmp_path, byte_tokenizer):
    model, params = hub.load(save_base("llama"))
    params = with_adapter(model, params, ["q_proj"])
    byte_tokenizer.pad_token_id = 77
    try:
        hub.save_model(tmp_path / "reward", model, params, byte_tokenizer)
    finally:
        byte_tokenizer.pad_token = None
    padded = torch.tensor(TOKENS).long()
    padded[0, 4:] = json.loads((tmp_path / "reward" / "config.json").read_text())["pad_token_id"]
    with torch.no_grad():
        found = open_classifier(tmp_path / "reward").eval()(padded).logits[:, 0].numpy()
    hidden = model.hidden(params, jnp.asarray(TOKENS))[0]
    expected = model.score(params, jnp.stack([hidden[0, 3], hidden[1, -1]]))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)


def test_an_adapter_on_a_reward_model_keeps_its_head(tmp_path):
    make_classifier("llama").save_pretrained(tmp_path / "reward")
    model, base = hub.load(tmp_path / "reward")
    params = lora.init(
        base, lora.LoraConfig(r=3, target_modules=("q_proj",), init_lora_weights=False), jax.random.key(0)
    )
    hub.save_adapter(tmp_path / "adapter", params)
    expected = torch_scores(open_peft(tmp_path / "reward", tmp_path / "adapter"))
    np.testing.assert_allclose(scores(model, params), expected, rtol=1e-5, atol=1e-5)
    loaded = hub.load_adapter(base, tmp_path / "adapter")
    np.testing.assert_array_equal(scores(model, loaded), scores(model, params))
    trained = lora.init(
        base,
        lora.LoraConfig(r=3, target_modules=("q_proj",), modules_to_save=("score",), init_lora_weights=False),
        jax.random.key(0),
    )
    trained["score"]["trained_kernel"] = 2 * trained["score"]["trained_kernel"]
    hub.save_adapter(tmp_path / "trained", trained)
    expected = torch_scores(open_peft(tmp_path / "reward", tmp_path / "trained"))
    np.testing.assert_allclose(scores(model, trained), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(scores(model, trained), 2 * scores(model, params), rtol=1e-5, atol=1e-5)
    assert_equal(hub.load_adapter(base, tmp_path / "trained"), trained)


def test_a_packed_reward_model(save_base, tmp_path):
    model, params = hub.load(save_base("llama"), quant=PACKED)
    params = params | {"score": {"kernel": with_adapter(model, params, ["q_proj"])["score"]["trained_kernel"]}}
    hub.save_quantized(tmp_path / "packed", model, params)
    again, loaded = hub.load(tmp_path / "packed")
    del params["lm_head"]
    assert_equal(loaded, params)
    assert quant.is_packed(loaded["layers"]["self_attn"]["q_proj"]["kernel"])
    np.testing.assert_array_equal(scores(again, loaded), scores(model, params))


def test_several_labels_are_refused(save_base, tmp_path):
    classifier = make_classifier("llama", labels=3)
    classifier.save_pretrained(tmp_path / "classes")
    with pytest.raises(ValueError, match=r"score\.weight has shape \(3, 48\), a classifier of 3 labels; jlora reads"):
        hub.load(tmp_path / "classes")
    make_peft(classifier, target_modules=["q_proj"]).save_pretrained(tmp_path / "adapter")
    _, base = hub.load(save_base("llama"))
    with pytest.raises(
        ValueError, match=r"score\.weight has shape \(3, 48\), expected \(1, 48\): score heads have one"
    ):
        hub.load_adapter(base, tmp_path / "adapter")


def test_a_family_without_such_a_class_is_refused(tmp_path):
    fields = SIZES | dict(num_key_value_heads=1, bos_token_id=1, pad_token_id=0)
    model = models.build(transformers.GraniteConfig(**fields).to_dict())
    params = model.add_score(tree.map_with_path(lambda _, leaf: jnp.zeros(leaf.shape), model.abstract_params()))
    with pytest.raises(ValueError, match="no ForSequenceClassification for model_type 'granite'"):
        hub.save_model(tmp_path / "reward", model, params)


def test_the_table_of_classes_is_that_of_transformers():
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as NAMES

    from jlora.families import FAMILIES
    from jlora.hub.checkpoints.score import CLASSES

    assert {k: NAMES[k] for k in FAMILIES if k in NAMES} == CLASSES


def test_a_folder_without_its_head_is_refused(tmp_path):
    randomise(transformers.AutoModelForCausalLM.from_config(config_of("llama"))).save_pretrained(tmp_path / "reward")
    file = tmp_path / "reward" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": ["LlamaForSequenceClassification"]}))
    with pytest.raises(ValueError, match=r"missing score\.weight \(1, 48\)"):
        hub.load(tmp_path / "reward")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": 5}))
    hub.load(tmp_path / "reward")  # names of classes that are no names change nothing
