"""Chat encoding: the answer and its stop token are trained, the prompt and what follows are not."""

import functools
import json

import numpy as np
import pytest

from jlora.data import (
    encode,
    encode_preferences,
    encode_prompts,
    read_preferences,
    read_prompts,
    read_records,
    split_prompt,
)
from jlora.data.tokens import MOST_RECORDS
from jlora.errors import UserError


def trained_text(example, tokenizer):
    return tokenizer.decode(example.tokens[example.trained])


def untrained_text(example, tokenizer):
    return tokenizer.decode(example.tokens[~example.trained])


def chat(*turns, roles=("user", "assistant")):
    return {"messages": [{"role": roles[i % len(roles)], "content": text} for i, text in enumerate(turns)]}


def test_the_answer_and_its_stop_token_are_trained_and_nothing_else(tokenizer):
    [example], report = encode([chat("Two and two?", "Four.")], tokenizer, seq_len=256)
    assert trained_text(example, tokenizer) == "Four.<|im_end|>"
    assert untrained_text(example, tokenizer) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nTwo and two?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (report.examples, report.tokens, report.trained_tokens) == (1, len(example.tokens), 6)


def test_every_assistant_turn_is_trained(tokenizer):
    [example], _ = encode([chat("a?", "A.", "b?", "B.", "bye")], tokenizer, seq_len=256)
    assert trained_text(example, tokenizer) == "A.<|im_end|>B.<|im_end|>"


def test_prompt_and_completion_train_the_completion_alone(tokenizer):
    turns = chat("a?", "A.", "b?", "B.")["messages"]
    record = {"prompt": turns[:3], "completion": turns[3:]}
    [whole], _ = encode([record], tokenizer, seq_len=256)
    assert trained_text(whole, tokenizer) == "B.<|im_end|>"
    [mixed], _ = encode([{"prompt": turns[:3], "completion": "B."}], tokenizer, seq_len=256)
    np.testing.assert_array_equal(mixed.tokens, whole.tokens)


def test_tools_and_settings_reach_the_chat_template(make_tokenizer):
    tokenizer = make_tokenizer(
        "{{ tools | tojson if tools }}{{ mood }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
        "<|im_end|>",
    )
    record = chat("a?", "A.", "b?", "B.") | {"tools": [{"name": "f"}], "chat_template_kwargs": {"mood": "glad"}}
    [example], _ = encode([record], tokenizer, seq_len=99)
    assert untrained_text(example, tokenizer) == '[{"name": "f"}]glada?<|im_end|>b?<|im_end|>'
    assert trained_text(example, tokenizer) == "A.<|im_end|>B.<|im_end|>"


def test_plain_text_ends_with_the_stop_token(text_tokenizer):
    [example], _ = encode([{"prompt": "2+2=", "completion": "4"}], text_tokenizer, seq_len=16)
    assert trained_text(example, text_tokenizer) == "4<|end|>"
    assert untrained_text(example, text_tokenizer) == "2+2="
    [open_ended], _ = encode([{"prompt": "2+2=", "completion": "4"}], text_tokenizer, seq_len=64, end=False)
    assert text_tokenizer.decode(open_ended.tokens) == "2+2=4"


def test_all_tokens_count_when_asked(tokenizer):
    [example], report = encode([chat("a?", "A.")], tokenizer, seq_len=256, completion_only=False)
    assert example.trained.all()
    assert tokenizer.decode(example.tokens).endswith("A.<|im_end|>")
    assert report.trained_tokens == len(example.tokens) - 1  # nothing predicts the first token


def test_a_template_that_drops_reasoning_from_earlier_turns_still_trains_them(make_tokenizer):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = make_tokenizer(template, "<|im_end|>")
    [example], _ = encode([chat("a?", "A.", "b?", "B.")], tokenizer, seq_len=256)
    assert trained_text(example, tokenizer) == "A.<|im_end|><think>\n\n</think>\n\nB.<|im_end|>"


def test_a_turn_is_found_where_those_before_it_read_otherwise_without_the_rest(make_tokenizer):
    """Qwen 3 writes reasoning after the last question only, so an earlier answer stands behind other words."""
    template = (
        "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.reasoning_content and loop.index0 > ns.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = make_tokenizer(template, "<|im_end|>")
    messages = [
        {"role": "user", "content": "How warm?"},
        {"role": "assistant", "content": "Ask it.", "reasoning_content": "Hm."},
        {"role": "tool", "content": "20"},
        {"role": "assistant", "content": "It is 20."},
        {"role": "user", "content": "And there?"},
        {"role": "assistant", "content": "21.", "reasoning_content": "Well."},
    ]
    [example], _ = encode([{"messages": messages}], tokenizer, seq_len=400)
    assert trained_text(example, tokenizer) == ("Ask it.<|im_end|>It is 20.<|im_end|><think>Well.</think>21.<|im_end|>")


@pytest.mark.parametrize("stop", ["</s>", ""])
def test_a_system_text_before_the_last_question_alone_moves_no_mask(make_tokenizer, stop):
    """As Mistral's template has it: no user's words are trained."""
    template = (
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST]"
        "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }} {% endif %}{{ m.content }}[/INST]"
        f"{{% else %}}{{{{ m.content }}}}{stop}{{% endif %}}{{% endfor %}}"
    )
    tokenizer = make_tokenizer(template, "</s>")
    record = {"messages": [{"role": "system", "content": "Short."}, *chat("a?", "A.", "b?", "B.")["messages"]]}
    [example], _ = encode([record], tokenizer, seq_len=400)
    assert trained_text(example, tokenizer) == f"A.{stop}B.</s>"


def test_the_stop_token_is_the_templates_own_not_the_tokenizers(make_tokenizer):
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    tokenizer = make_tokenizer(template + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", "<|end|>")
    [example], _ = encode([chat("a?", "A.")], tokenizer, seq_len=256)
    assert trained_text(example, tokenizer) == "A.<|im_end|>"


def test_a_template_without_a_stop_token_gets_the_tokenizers(make_tokenizer):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer = make_tokenizer(template + "{% if add_generation_prompt %}assistant: {% endif %}", "<|end|>")
    [example], _ = encode([chat("a?", "A.", "b?", "B.")], tokenizer, seq_len=256)
    assert trained_text(example, tokenizer) == "A.\nB.\n<|end|>"


def test_overlong_records_are_cut_dropped_or_refused(tokenizer):
    records = [chat("a?", "A."), chat("a?", "A" * 40), chat("a" * 200, "A.")]
    short, middle, long = (len(encode([record], tokenizer, seq_len=999)[0][0].tokens) for record in records)
    kept, report = encode(records, tokenizer, seq_len=short + 2)
    assert (len(kept), report.dropped, report.cut, report.untrained) == (1, 2, 0, 0)
    kept, report = encode(records, tokenizer, seq_len=short + 2, overlong="cut")
    assert (len(kept), report.dropped, report.cut, report.untrained) == (2, 0, 1, 1)
    assert len(kept[1].tokens) == short + 2
    assert set(trained_text(kept[1], tokenizer)) == {"A"}
    with pytest.raises(ValueError) as error:
        encode(records, tokenizer, seq_len=short + 2, overlong="error")
    assert f"record 2: found {middle} tokens, expected at most {short + 2}" in str(error.value)
    assert f"record 3: found {long} tokens" in str(error.value)


def test_nothing_to_train_on_is_an_error(tokenizer):
    with pytest.raises(
        ValueError, match=r"no token to train on in 2 records: 2 longer than 8 tokens and dropped, 0 without"
    ):
        encode([chat("a?", "A.")] * 2, tokenizer, seq_len=8)
    with pytest.raises(ValueError, match=r"2 without a completion token within 8 tokens; raise train.seq_len"):
        encode([chat("a?", "A.")] * 2, tokenizer, seq_len=8, overlong="cut")


def test_chats_need_a_chat_template(text_tokenizer):
    with pytest.raises(ValueError, match="1 of 2 records are chats, but the tokenizer has no chat template"):
        encode([chat("a?", "A."), {"prompt": "a", "completion": "b"}], text_tokenizer, seq_len=64)


def test_all_records_the_template_refuses_are_named(make_tokenizer):
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    )
    system = chat("s", "u", "a", roles=("system", "user", "assistant"))
    with pytest.raises(ValueError) as error:
        encode([system, chat("a?", "A."), system], make_tokenizer(template, "<|im_end|>"), seq_len=64)
    refused = "record 1, record 3: the chat template refuses the roles system, user, assistant: no system role"
    assert refused in str(error.value)
    assert "record 2" not in str(error.value)


def test_split_prompt_gives_the_question_and_the_answer():
    turns = chat("a?", "A.", "b?", "B.", "bye")["messages"]
    assert split_prompt({"messages": turns}) == (turns[:3], "B.")
    assert split_prompt({"prompt": "2+2=", "completion": "4"}) == ("2+2=", "4")
    assert split_prompt({"prompt": turns[:1], "completion": "A."}) == (turns[:1], "A.")


def test_records_that_cannot_be_encoded_may_be_left_out(make_tokenizer):
    template = (
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('no') }}{% endif %}"
        "<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    )
    records = [chat("no", "a"), chat("b?", "B."), chat("no", "c"), chat("d?", "D.")]
    other = chat("x", "x")["messages"][1:]
    pairs = [{"prompt": r["messages"][:1], "chosen": r["messages"][1:], "rejected": other} for r in records]
    tokenizer = make_tokenizer(template, "<|im_end|>")
    for encoder, given in ((encode, records), (encode_preferences, pairs)):
        notes = []
        found, report = encoder(given, tokenizer, seq_len=64, on_error="skip", note=notes.append)
        assert (len(found), report.kept) == (2, (1, 3))
        [note] = notes
        assert note.startswith("2 of 4 records cannot be encoded and are left out:\n  record 1, record 3: the chat")
        with pytest.raises(UserError, match=r'2 of 4 records cannot be encoded; data.on_error="skip"'):
            encoder(given, tokenizer, seq_len=64)
        with pytest.raises(UserError, match="1 of 1 record cannot be encoded:"):
            encoder(given[:1], tokenizer, seq_len=64, on_error="skip")
    notes = []
    items, report = encode_prompts(pairs, tokenizer, 64, on_error="skip", note=notes.append)
    assert (len(items), report.kept, report.dropped) == (2, (1, 3), 0)
    assert "2 of 4 prompts cannot be encoded and are left out" in notes[0]


@pytest.mark.parametrize(
    ("reader", "encoder", "length"),
    [
        (read_records, encode, "seq_len"),
        (read_prompts, encode_prompts, "max_prompt_length"),
        (functools.partial(read_preferences, kind="pairs"), encode_preferences, "seq_len"),
        (
            functools.partial(read_preferences, kind="unpaired"),
            functools.partial(encode_preferences, kind="unpaired"),
            "seq_len",
        ),
    ],
)
def test_records_of_a_file_are_named_by_their_lines(make_tokenizer, tmp_path, reader, encoder, length):
    template = "{{ raise_exception('no') if messages[0].content == 'no' }}{{ messages[-1].content }}"
    rows = [
        chat(word, "a") | {"prompt": chat(word)["messages"], "chosen": "a", "rejected": "b"} for word in ("ok", "no")
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in (*rows, 3, rows[1])))
    records = reader(path, on_error="skip", note=lambda message: None)
    with pytest.raises(UserError, match=rf"{path}:3, .*:7"):
        encoder(records, make_tokenizer(template, "<|im_end|>"), **{length: 99})


def test_records_are_read_as_they_are_encoded(tokenizer):
    read, waiting = [], []

    def records():
        for number in range(900):
            read.append(number)
            yield chat(f"{number}?", "A.")

    found, report = encode(records(), tokenizer, seq_len=256, progress=lambda done: waiting.append(len(read) - done))
    assert len(found) == report.examples == len(waiting) == 900
    assert min(waiting) >= 0 and max(waiting) <= MOST_RECORDS
