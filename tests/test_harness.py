"""lm-evaluation-harness gives the same numbers for jlora's model as for transformers'."""

import json
import warnings

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from jlora import hub
from jlora.train import resolve
from jlora.train.adapt import adapt
from jlora.train.evaluation.records import record_sums

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from jlora.harness import JaxLM

WORDS = ["the", "old", "map", "showed", "a", "road", "where", "there", "was", "now", "only", "forest", "and", "water"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Settings of one task of each kind, on files."""
    folder = tmp_path_factory.mktemp("tasks")
    generator = np.random.default_rng(0)

    def text(count):
        return " ".join(generator.choice(WORDS, count))

    rows = [
        {"q": text(3 + i % 5), "choices": [text(2), text(1 + i % 3)], "label": i % 2, "text": text(40)}
        for i in range(5)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
    }
    chosen = {
        "task": "choosing",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}} ",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    rolling = {
        "task": "rolling",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    }
    writing = {
        "task": "writing",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{q}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    return [common | one for one in (chosen, rolling, writing)]


def test_numbers_and_texts_are_those_of_the_hugging_face_class(model_folder, tasks):
    tokenizer = hub.load_tokenizer(model_folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    models = [
        JaxLM(*hub.load(model_folder, dtype="float32"), tokenizer, batch_size=4, max_length=48),
        HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=4, max_length=48, device="cpu"),
    ]
    settings = dict(bootstrap_iters=0, log_samples=True, random_seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, expected = (lm_eval.simple_evaluate(model, tasks=tasks, **settings) for model in models)
    for name in ("choosing", "rolling", "writing"):
        for metric, value in expected["results"][name].items():
            if isinstance(value, float):
                assert ours["results"][name][metric] == pytest.approx(value, rel=1e-5), (name, metric)
        for mine, other in zip(ours["samples"][name], expected["samples"][name], strict=True):
            for one, two in zip(mine["resps"], other["resps"], strict=True):
                if name == "writing":
                    assert one == two
                else:
                    np.testing.assert_allclose(np.ravel(one), np.ravel(two), rtol=1e-5)
    assert any(sample["resps"][0][0] for sample in ours["samples"]["writing"])


def test_a_text_may_fill_the_learned_positions(tmp_path, byte_tokenizer, tasks):
    torch.manual_seed(0)
    sizes = dict(vocab_size=257, n_embd=24, n_layer=2, n_head=3, n_positions=32, eos_token_id=0, bos_token_id=0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    theirs.save_pretrained(tmp_path)
    model, params = hub.load(tmp_path, dtype="float32")
    lm = JaxLM(model, params, byte_tokenizer)
    assert lm.max_length == 32
    requests = [("", [1] * 20, list(range(5, 5 + count))) for count in (12, 13, 30)]
    found = lm._loglikelihood_tokens(requests)
    other = HFLM(pretrained=theirs, tokenizer=byte_tokenizer, batch_size=1, max_length=32, device="cpu")
    expected = other._loglikelihood_tokens([(("a", "b"), *request[1:]) for request in requests], disable_tqdm=True)
    np.testing.assert_allclose([score for score, _ in found], [score for score, _ in expected], rtol=1e-5)
    with pytest.raises(ValueError, match="max_length: 33 tokens in a row, but gpt2 has learned 32 positions"):
        JaxLM(model, params, byte_tokenizer, max_length=33)
    record = {"prompt": "x" * 40, "completion": "y"}
    with pytest.raises(ValueError, match="seq_len: 41 tokens in a row, but gpt2 has learned 32"):
        record_sums(model, params, byte_tokenizer, [record], seq_len=64)
    long = resolve({"model": {"path": str(tmp_path)}, "data": {"path": "x"}, "train": {"steps": 1, "seq_len": 33}})
    with pytest.raises(ValueError, match=r"train\.seq_len: 33 tokens in a row, but gpt2 has learned 32"):
        adapt(model, params, long)


def test_a_text_that_begins_with_the_beginning_of_text_gets_no_second_one(tmp_path, byte_tokenizer):
    backend = tokenizers.Tokenizer.from_str(byte_tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens(["<|begin|>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 257)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|end|>"
    )
    torch.manual_seed(0)
    sizes = dict(vocab_size=258, n_embd=24, n_layer=2, n_head=3, n_positions=128, eos_token_id=0, bos_token_id=257)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, initializer_range=0.5)).eval()
    theirs.save_pretrained(tmp_path)
    ours = JaxLM(*hub.load(tmp_path, dtype="float32"), tokenizer)
    other = HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=1, max_length=64, device="cpu")
    texts = ["<|begin|><|user|>a question<|end|>", "a question", "a<|begin|>"]
    asked = {"until": [], "max_gen_toks": 12, "do_sample": False}
    requests = [Instance("generate_until", {}, (text, dict(asked)), number) for number, text in enumerate(texts)]
    expected = other.generate_until(requests, disable_tqdm=True)
    assert ours.generate_until(requests) == expected
    for text in texts:
        assert ours.tok_encode(text) == other.tok_encode(text) == other.tok_batch_encode([text])[0][0].tolist()
    # The start of what greedy decoding gave is greedy, something else is not.
    pairs = [(texts[0], expected[0][:2]), (texts[0], "!")]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    found, expected = ours.loglikelihood(requests), other.loglikelihood(requests, disable_tqdm=True)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert [greedy for _, greedy in found] == [True, False]


def test_what_the_harness_may_not_ask_for_is_said(model_folder):
    class Request:
        args = ("a", {"until": ["x"], "num_beams": 3})

    lm = JaxLM(*hub.load(model_folder, dtype="float32"), hub.load_tokenizer(model_folder))
    with pytest.raises(ValueError, match="generation: num_beams=3 is not supported"):
        lm.generate_until([Request()])


def test_settings_that_change_nothing_are_let_by_and_others_are_named(model_folder):
    lm = JaxLM(*hub.load(model_folder, dtype="float32"), hub.load_tokenizer(model_folder))

    def text(**asked):
        request = Instance("generate_until", {}, ("the old map", {"until": ["e"], **asked}), 0)
        return lm.generate_until([request])

    plain = text(max_gen_toks=5)
    idle = dict(num_beams=1, min_p=0, do_sample=False, repetition_penalty=1.0, top_k=None, seed=3, length_penalty=2.0)
    assert text(max_tokens=5, **idle) == text(max_new_tokens=5, min_p=0.3) == plain
    wrong = dict(num_beams=4, repetition_penalty=1.2, guidance_scale=2.0, max_gen_toks=5, max_tokens=6)
    with pytest.raises(ValueError, match="num_beams=4 is not supported; leave it out or give 1") as caught:
        text(**wrong)
    for part in ("repetition_penalty=1.2", "guidance_scale=2.0 is not supported, only until", "'max_tokens': 6"):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match=r"min_p=0\.3 is not supported; leave it out or give 0"):
        text(do_sample=True, min_p=0.3)
