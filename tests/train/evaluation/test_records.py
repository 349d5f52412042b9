"""Evaluation: the loss is that of the completions alone, and metrics are those of the generated texts."""

import json

import jax
import numpy as np
import pytest

from jlora import models, sharding
from jlora.data import encode
from jlora.generate import generate
from jlora.train.evaluation.records import evaluate, record_sums


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer):
    return byte_tokenizer


@pytest.fixture(scope="module")
def model():
    return models.build(
        {
            "model_type": "llama",
            "vocab_size": 257,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "eos_token_id": 0,
        }
    )


@pytest.fixture(scope="module")
def params(model):
    return jax.jit(model.random_params)(jax.random.key(0))


RECORDS = [
    {"prompt": "2+2=", "completion": "4", "id": 7},
    {"prompt": "Say it twice: ab ", "completion": "abab"},
    {"prompt": "", "completion": "a text without any prompt"},
]


def test_the_loss_is_the_mean_over_all_completion_tokens(model, params, tokenizer):
    numbers, answers = evaluate(model, params, tokenizer, RECORDS, batch_size=2, seq_len=32, generate_texts=False)
    examples, report = encode(RECORDS, tokenizer, seq_len=32)
    losses = []
    for example in examples:
        log_probs = jax.nn.log_softmax(model(params, example.tokens[None])[0])
        losses += [-log_probs[i, example.tokens[i + 1]] for i in np.flatnonzero(example.trained[1:])]
    assert answers == []
    assert numbers["tokens"] == report.trained_tokens == len(losses)
    np.testing.assert_allclose(numbers["loss"], np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(numbers["perplexity"], np.exp(np.mean(losses)), rtol=1e-4)
    assert numbers["n"] == 3
    lost = jax.tree.map(lambda leaf: leaf * np.nan, params)
    numbers, _ = evaluate(model, lost, tokenizer, RECORDS, batch_size=2, seq_len=32, generate_texts=False)
    assert np.isnan([numbers["loss"], numbers["perplexity"]]).all()


def test_rows_of_any_length_divide_over_a_mesh_of_three(model, params, tokenizer):
    mesh = sharding.make_mesh(sharding.MeshConfig(sequence=3), jax.devices()[:3])
    settings = dict(batch_size=1, seq_len=96)
    spread = record_sums(model, sharding.shard(params, mesh), tokenizer, RECORDS, mesh=mesh, **settings)
    for one, other in zip(spread, record_sums(model, params, tokenizer, RECORDS, **settings), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_records_keep_their_places_where_nothing_of_one_is_left(model, params, tokenizer):
    long = {"prompt": "x" * 40, "completion": "y"}
    expected = record_sums(model, params, tokenizer, RECORDS, batch_size=2, seq_len=32)
    found = record_sums(model, params, tokenizer, [RECORDS[0], long, *RECORDS[1:], long], batch_size=2, seq_len=32)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, [other[0], 0, other[1], other[2], 0], rtol=1e-6)
    settings = dict(batch_size=2, seq_len=32, generate_texts=False)
    numbers, _ = evaluate(model, params, tokenizer, [long, *RECORDS], **settings)
    assert (numbers["n"], numbers["dropped"]) == (4, 1)
    assert numbers["loss"] == pytest.approx(np.sum(expected.loss) / np.sum(expected.tokens))
    with pytest.raises(ValueError, match="no token to train on in 1 record:"):
        evaluate(model, params, tokenizer, [long], **settings)


def test_answers_are_scored_one_by_one_and_averaged(model, params, tokenizer):
    [said] = generate(model, params, tokenizer, [RECORDS[0]["prompt"]], max_new_tokens=4)
    records = [RECORDS[0] | {"completion": said.strip() or "x"}, RECORDS[1]]
    numbers, answers = evaluate(model, params, tokenizer, records, max_new_tokens=4, batch_size=2, seq_len=32)
    assert [answer["text"] for answer in answers] == generate(
        model, params, tokenizer, [record["prompt"] for record in records], max_new_tokens=4
    )
    assert answers[0] == {
        "id": 7,
        "prompt": "2+2=",
        "target": records[0]["completion"],
        "text": said,
        "exact_match": 1.0,
    }
    assert "id" not in answers[1]
    assert numbers["exact_match"] == 0.5


def test_the_target_of_an_answer_that_calls_a_tool_is_the_call_as_the_template_writes_it(
    model, params, tokenizer, monkeypatch
):
    template = "{% for m in messages %}{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}<|end|>{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    records = [{"messages": [{"role": "user", "content": "2+2="}, answer]}]
    _, [found] = evaluate(model, params, tokenizer, records, max_new_tokens=1, seq_len=200)
    assert found["target"] == json.dumps([call])
