"""An answer ends where the chat template says so, wherever jlora answers and in whatever it writes.

The model of these tests says a fixed text: each token has one that follows it, and after the answer comes the token
that the template writes there. Its own end of text, which it never says, is another.
"""

import itertools
import json

import jax
import numpy as np
import pytest
import tokenizers
import torch
import transformers

import jlora
from jlora import hub, models
from jlora.ends import end_ids, template_end
from jlora.train import resolve, run
from jlora.train.evaluation.records import evaluate
from jlora.train.reporting.metrics import read_metrics

ANSWER = "Fine."
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# A template, and the special token that it writes behind an answer.
TEMPLATES = {
    "ChatML": (CHATML, "<|im_end|>"),
    "turns": (CHATML.replace("<|im_start|>", "<turn>").replace("<|im_end|>\n", "\n<end_of_turn>"), "<end_of_turn>"),
    "the end of text": (CHATML.replace("<|im_end|>\n", "<|endoftext|>"), "<|endoftext|>"),
    "words alone": (CHATML.replace("<|im_end|>", "### End"), None),
    "refuses a first user": ("{{ raise_exception('system first') }}", None),
    "calls what is not there": ("{{ messages[0].content.nosuch() }}", None),
    "none": (None, None),
}
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<turn>", "<end_of_turn>"]


def make_tokenizer(template):
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(SPECIALS)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    tokenizer.chat_template = template
    return tokenizer


def speaker(tokenizer, folder, order):
    """The folder of a Llama that says each token of `order` after the one before it."""
    size, width = len(tokenizer), 96
    config = transformers.LlamaConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = transformers.LlamaForCausalLM(config)
    follows = np.random.default_rng(0).permutation(size)
    for first, second in itertools.pairwise(order):
        other = int(np.flatnonzero(follows == second)[0])
        follows[other], follows[first] = follows[first], second
    rows = torch.nn.functional.normalize(torch.randn(size, width, generator=torch.Generator().manual_seed(1)), dim=1)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(rows)
        model.lm_head.weight[torch.from_numpy(follows)] = rows
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model with ChatML, which answers every question with the same word."""
    tokenizer = make_tokenizer(CHATML)
    order = tokenizer("\n" + ANSWER + "<|im_end|>x", add_special_tokens=False)["input_ids"]
    return speaker(tokenizer, tmp_path_factory.mktemp("speaker"), order)


@pytest.fixture(scope="module")
def loaded(folder):
    return *jlora.load(folder), jlora.load_tokenizer(folder)


QUESTION = [{"role": "user", "content": "How are you?"}]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_end_of_a_template_is_the_first_special_token_behind_an_answer(name):
    template, end = TEMPLATES[name]
    tokenizer = make_tokenizer(template)
    expected = None if end is None else tokenizer.convert_tokens_to_ids(end)
    assert template_end(tokenizer) == expected
    ends = end_ids(tokenizer, (7,), 10_000)
    assert ends == tuple(dict.fromkeys([7, tokenizer.eos_token_id, *([] if expected is None else [expected])]))
    assert end_ids(tokenizer, (7, 9), 9) == (7,)  # what has no row ends nothing


def bank(params):
    adapter = jlora.lora.init(params, jlora.LoraConfig(r=2), jax.random.key(0))
    return jlora.lora.Bank.of(params, {"one": adapter})


def test_generate_ends_where_the_template_does(loaded):
    model, params, tokenizer = loaded
    rendered = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    for prompt in (QUESTION, rendered):
        assert jlora.generate(model, params, tokenizer, [prompt], max_new_tokens=12) == [ANSWER]
        found = jlora.generate(model, bank(params), tokenizer, [prompt], adapters=["one"], max_new_tokens=12)
        assert found == [ANSWER]


def test_a_text_ends_with_the_end_of_text_though_there_is_a_template(tmp_path):
    tokenizer = make_tokenizer(CHATML)
    order = tokenizer("a b<|endoftext|>x", add_special_tokens=False)["input_ids"]
    folder = speaker(tokenizer, tmp_path, order)
    assert jlora.generate(*jlora.load(folder), tokenizer, ["a"], max_new_tokens=9) == [" b"]


def test_evaluation_and_the_harness_end_where_the_template_does(loaded):
    model, params, tokenizer = loaded
    record = {"messages": [*QUESTION, {"role": "assistant", "content": ANSWER}]}
    numbers, _ = evaluate(model, params, tokenizer, [record], max_new_tokens=12, seq_len=64)
    assert numbers["exact_match"] == 1
    harness = pytest.importorskip("jlora.harness")
    from lm_eval.api.instance import Instance

    evaluated = harness.JaxLM(model, params, tokenizer, max_length=64)
    asked = Instance("generate_until", {}, (evaluated.apply_chat_template(QUESTION), {"max_gen_toks": 12}), 0)
    assert evaluated.generate_until([asked]) == [ANSWER]


def test_rollouts_end_where_the_template_does(folder, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": QUESTION}) + "\n")
    (tmp_path / "reward.py").write_text("def reward(completions, **rest):\n    return [0.0, 1.0]\n")
    settings = {
        "algorithm": "grpo",
        "model": {"path": str(folder)},
        "data": {"path": str(tmp_path / "prompts.jsonl")},
        "train": {"steps": 1, "batch_size": 2, "seq_len": 128},
        "lora": {"r": 2, "target_modules": ("q_proj",)},
        "rollout": {
            "rewards": (f"{tmp_path}/reward.py:reward",),
            "num_generations": 2,
            "max_completion_length": 12,
            "top_k": 1,
        },
    }
    run(resolve(settings), tmp_path / "run")
    (step,) = read_metrics(tmp_path / "run")
    assert step["completions/clipped_ratio"] == 0


@pytest.mark.parametrize("form", ["folder", "packed folder", "gguf"])
def test_what_is_exported_ends_where_the_template_does(form, folder, loaded, tmp_path):
    model, params, tokenizer = loaded
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    if form == "gguf":
        pytest.importorskip("gguf")
        hub.save_gguf(tmp_path / "m.gguf", model, params, tokenizer, dtype="f32")
        again = hub.read_model(tmp_path / "m.gguf")
        hub.save_gguf(tmp_path / "copy.gguf", model, params, tmp_path / "m.gguf", dtype="f32")
        assert hub.read_model(tmp_path / "copy.gguf").config.eos_token_ids == tuple(ends)
    else:
        if form == "packed folder":
            params = jlora.load(folder, quant="int8")[1]
        (jlora.save_model if form == "folder" else hub.save_quantized)(tmp_path, model, params, tokenizer=tokenizer)
        again = hub.read_model(tmp_path)
        assert transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id == ends
    assert again.config.eos_token_ids == tuple(ends)
    if form == "folder":
        reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        found = reference.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert tokenizer.decode(found[0, ids["input_ids"].shape[1] :], skip_special_tokens=True) == ANSWER


def test_an_export_keeps_a_generation_config_that_names_all_ends(loaded, tmp_path):
    model, params, tokenizer = loaded
    generation = {"eos_token_id": [tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id], "top_k": 3}
    (tmp_path / "m").mkdir()
    jlora.save_model(tmp_path / "m", model, params, tokenizer=tokenizer)
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps(generation))
    again, params = jlora.load(tmp_path / "m")
    jlora.save_model(tmp_path / "n", again, params, tokenizer=tokenizer)
    assert json.loads((tmp_path / "n" / "generation_config.json").read_text()) == generation
    bare = models.build({**model.config.to_hf(), "generation_config": None})
    jlora.save_model(tmp_path / "o", bare, params)  # of a tokenizer that is not given nothing is known
    assert not (tmp_path / "o" / "generation_config.json").exists()
