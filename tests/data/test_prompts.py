"""Prompts: what there is to generate from, with the columns that rewards read."""

import copy
import json

import pytest
import tokenizers

from jlora.data import encode, encode_prompt, encode_prompts, read_prompts

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def read(folder, *records):
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_prompts(path)


def test_a_prompt_keeps_the_other_columns(tmp_path):
    records = [{"prompt": "2+2=", "answer": 4}, {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}]
    assert read(tmp_path, *records) == records


def test_messages_are_split_at_the_last_answer(tmp_path):
    messages = [USER, ANSWER, USER, {**ANSWER, "content": "b"}]
    one, two = read(tmp_path, {"messages": messages, "id": 1}, {"messages": messages[:2], "completion": "mine"})
    assert one == {"messages": messages, "prompt": messages[:3], "completion": "b", "id": 1}
    assert (two["prompt"], two["completion"]) == ([USER], "mine")


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (3, "found a number, expected an object with"),
        ({"text": "a"}, "found the fields ['text'] without prompt"),
        ({"prompt": ""}, "prompt: found empty text, expected something to continue"),
        ({"prompt": None}, "prompt: found null, expected text or a list of messages"),
        ({"prompt": []}, "prompt: found an empty list"),
        (
            {"prompt": [USER, ANSWER]},
            "prompt: found a message of the assistant at the end, expected a message of the user",
        ),
        ({"messages": [{"role": "system", "content": "s"}]}, "messages: found a message of the system at the end"),
        ({"prompt": [USER], "tools": {}}, "tools: found an object, expected a list"),
        ({"messages": [ANSWER]}, "messages before the last assistant message: found none, expected"),
    ],
)
def test_a_bad_prompt_is_named(tmp_path, record, words):
    with pytest.raises(ValueError) as error:
        read(tmp_path, {"prompt": "p"}, record)
    assert f"{tmp_path / 'data.jsonl'}:2: {words}" in str(error.value)


@pytest.mark.parametrize("prompt", [[USER], [USER, ANSWER, USER]])
def test_messages_end_with_the_opening_of_an_answer(tokenizer, prompt):
    expected = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert encode_prompt(prompt, tokenizer) == expected
    assert tokenizer.decode(expected).endswith("<|im_start|>assistant\n")


def test_tools_and_settings_reach_the_chat_template(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer("{{ tools | tojson if tools }}{{ mood }}{{ messages[0].content }}", "<|im_end|>")
    [record] = read(tmp_path, {"prompt": [USER], "tools": '[{"name": "f"}]', "chat_template_kwargs": {"mood": "glad"}})
    [item], _ = encode_prompts([record], tokenizer, 99)
    assert tokenizer.decode(item.documents[0].tokens) == '[{"name": "f"}]gladq'


def test_text_is_continued_as_it_is(tokenizer):
    assert tokenizer.decode(encode_prompt("2+2=", tokenizer)) == "2+2="


def test_a_text_that_begins_with_the_beginning_of_text_gets_no_second_one(make_tokenizer):
    tokenizer = make_tokenizer(None, "<|end|>")
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 0)]
    )
    for text in ("a", "<|im_start|>a"):
        assert tokenizer.decode(encode_prompt(text, tokenizer)) == "<|im_start|>a"
    [example], _ = encode([{"prompt": "<|im_start|>a", "completion": "b"}], tokenizer, seq_len=9)
    assert tokenizer.decode(example.tokens) == "<|im_start|>ab<|end|>"


def test_long_prompts_are_dropped_or_refused(byte_tokenizer):
    records = [{"prompt": text} for text in ("abc", "abcdef", "ab", "abcde")]
    items, report = encode_prompts(records, byte_tokenizer, 3)
    assert [byte_tokenizer.decode(one.tokens) for one in items.examples] == ["abc", "ab"]
    assert not items.examples.columns["trained"].any()
    assert list(items.records) == [records[0], records[2]]
    assert (report.kept, report.dropped) == ((0, 2), 2)
    with pytest.raises(ValueError) as error:
        encode_prompts(records, byte_tokenizer, 3, overlong="error")
    for words in ("record 2: found 6 tokens, expected at most 3", "record 4: found 5 tokens"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match=r"every prompt is longer than 1 token \(found 4\)"):
        encode_prompts(records, byte_tokenizer, 1)


def test_prompts_that_cannot_be_encoded_are_named(text_tokenizer):
    with pytest.raises(ValueError) as error:
        encode_prompts([{"prompt": ""}, {"prompt": "a"}, {"prompt": [USER]}], text_tokenizer, 9)
    assert "record 1: found an empty prompt: there is nothing to continue" in str(error.value)
    assert "record 3: found a list of messages, but the tokenizer has no chat template" in str(error.value)


def test_an_answer_that_calls_a_tool_is_the_call_as_the_template_writes_it(tmp_path, tokenizer):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    messages = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
    records = read(tmp_path, {"messages": messages}, {"messages": messages, "completion": "mine"}, {"prompt": [USER]})
    calling = copy.copy(tokenizer)
    calling.chat_template = tokenizer.chat_template.replace(
        "message.content +", "message.content + (message.tool_calls | tojson if message.tool_calls else '') +"
    )
    called, mine, asked = encode_prompts(records, calling, 99)[0].records
    assert called == records[0] | {"completion": json.dumps([call])}
    assert (mine, asked) == (records[1], records[2])
