"""Random chats through every chat template that TRL ships: tokens and masks are transformers', or the chat is refused.

Each word of a chat is there once, so that what is trained can be read off it.
"""

import importlib.util
import itertools
import pathlib
import random
import re

import numpy as np
import pytest
import tokenizers
import transformers

from jlora.data import encode, encode_preferences, encode_prompt
from jlora.errors import UserError

FOLDER = pathlib.Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
SPECIAL = re.compile(
    r"<\|[^|<>\s'\"]{1,40}\|>|<｜[^｜<>]{1,40}｜>|<(?:start|end)_of_turn>|<end_of_utterance>|</s>|<\|[a-z_\"]+\|?>|"
    r"<[a-z_]+\|>"
)
KINDS = (
    "plain",
    "system",
    "spaces",
    "calls",
    "calls several",
    "calls beside missing",
    "calls beside reasoning",
    "calls spaces system",
    "reasoning",
    "inline",
    "rows",
    "stops",
    "first",
)
# Templates that write the words of a chat in lists of parts alone.
PARTS = ("idefics3", "smolvlm", "llava_next")


def build(name):
    """Bytes as tokens, the template's special tokens, and "\\n\\n" as one."""
    template = (FOLDER / f"{name}.jinja").read_text()
    special = sorted({"<s>", "</s>", *SPECIAL.findall(template)})
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*special, *alphabet, "ĊĊ"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("Ċ", "Ċ")]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


class Chats:
    """Chats of a kind, no word of which occurs twice."""

    def __init__(self, seed):
        self.random, self.count = random.Random(seed), itertools.count(100)

    def words(self, most=4, kind=""):
        found = " ".join(f"tide{next(self.count)}" for _ in range(self.random.randint(1, most)))
        if "spaces" in kind:
            found = self.random.choice(["", " ", "\n", "\n\n"]) + found + self.random.choice(["", " ", "\n"])
        return found

    def calling(self, kind):
        calls = [
            {
                "id": f"call{next(self.count)}x",
                "type": "function",
                "function": {
                    "name": f"get_{self.words(1)}",
                    "arguments": {"harbour": self.words(1), "hour": next(self.count)},
                },
            }
            for _ in range(self.random.randint(1, 2) if "several" in kind else 1)
        ]
        said = {"content": self.words(2)} if "beside" in kind and self.random.random() < 0.4 else {"content": ""}
        if "missing" in kind and not said["content"]:
            said = {}
        thought = {"reasoning_content": self.words()} if "reasoning" in kind else {}
        results = [
            {"role": "tool", "tool_call_id": call["id"], "name": call["function"]["name"], "content": self.words()}
            for call in calls
        ]
        return [{"role": "assistant", **said, **thought, "tool_calls": calls}, *results]

    def chat(self, kind):
        messages = [{"role": "system", "content": self.words()}] if "system" in kind else []
        messages += [{"role": "assistant", "content": self.words()}] if "first" in kind else []
        for _ in range(self.random.randint(1, 3)):
            messages.append({"role": "user", "content": self.words(kind=kind)})
            messages += self.calling(kind) if "calls" in kind and self.random.random() < 0.7 else []
            answer = {"role": "assistant", "content": self.words(kind=kind)}
            if "stops" in kind:
                messages[-1]["content"] += " <|im_end|> <end_of_turn> <|eot_id|></s> " + self.words(1)
                answer["content"] += " <|im_end|> <end_of_turn> <|eot_id|></s> " + self.words(1)
            if kind == "reasoning":
                answer["reasoning_content"] = self.words()
            if "inline" in kind:
                answer["content"] = f"<think>{self.words()}</think>{answer['content']}"
            messages.append(answer)
            messages += [{"role": "assistant", "content": self.words()}] if "rows" in kind else []
        names = sorted(call["function"]["name"] for message in messages for call in message.get("tool_calls", ()))
        return {"messages": messages} | ({"tools": list(map(tool, names))} if names else {})


def tool(name):
    harbour = {"type": "string", "description": "Where."}
    parameters = {"type": "object", "properties": {"harbour": harbour, "hour": {"type": "integer", "description": "."}}}
    function = {"name": name, "description": "Gives it.", "parameters": parameters | {"required": ["harbour"]}}
    return {"type": "function", "function": function}


def as_transformers(record, name):
    """What `apply_chat_template` is given for a record."""
    messages = [{"content": ""} | message for message in record["messages"]]
    if name.startswith(PARTS):
        messages = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]
    return messages, ({"tools": record["tools"]} if "tools" in record else {})


def numbers(text):
    """The words of a text, by what is theirs alone."""
    return set(re.findall(r"tide\d+", str(text)))


def check_masks(record, example, tokenizer, learned):
    """All that is said in the answers is trained, and no word of anybody else."""
    trained = numbers(tokenizer.decode(example.tokens[example.trained]))
    left_out = numbers(record["messages"]) - numbers(tokenizer.decode(example.tokens))
    said = [{key: value for key, value in message.items() if key != "role"} for message in learned]
    assert trained == numbers(said) - left_out
    reasons = [(one.get("reasoning_content"), one.get("content", "").partition("</think>")[0]) for one in learned[:-1]]
    beside = [one.get("content") for one in learned if "tool_calls" in one]
    assert left_out <= numbers([reasons, beside])  # what templates leave out of earlier turns by design


def check_sft(record, name, tokenizer):
    """Whether the record is trained; if so it is as transformers has it."""
    try:
        [example], _ = encode([record], tokenizer, seq_len=10**6)
    except UserError as error:
        assert re.search("record 1: the chat template (leaves out|refuses)", str(error)), error
        return False
    messages, variables = as_transformers(record, name)
    marks = "generation %}" in tokenizer.chat_template or "generation -%}" in tokenizer.chat_template
    expected = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=marks, **variables
    )
    tokens = example.tokens[: len(expected["input_ids"])]  # behind them an end of text, where the template has none
    np.testing.assert_array_equal(tokens, expected["input_ids"][: len(tokens)])
    learned = [message for message in record["messages"] if message["role"] == "assistant"]
    check_masks(record, example, tokenizer, learned)
    if marks:
        mask = np.array(expected["assistant_masks"], bool)
        np.testing.assert_array_equal(example.trained[: len(tokens)], mask[: len(tokens)])
        assert not mask[len(tokens) :].any()
    return True


def check_prompt(record, name, tokenizer):
    """The prompt before the last answer is transformers', and that of a pair with another answer is not trained."""
    *prompt, answer = record["messages"]
    messages, variables = as_transformers({**record, "messages": prompt}, name)
    try:
        found = encode_prompt(prompt, tokenizer, variables)
        pair = record | {"prompt": prompt, "chosen": [answer], "rejected": [{"role": "assistant", "content": "No."}]}
        [item], _ = encode_preferences([pair], tokenizer, seq_len=10**6)
    except UserError as error:
        assert "the chat template" in str(error)
        return
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, **variables)
    assert found == expected["input_ids"]
    chosen, rejected = (numbers(tokenizer.decode(one.tokens[one.trained])) for one in item.documents)
    assert chosen == numbers(answer)
    assert not rejected


def check(name, kinds, seeds):
    tokenizer, trained = build(name), {}
    for kind, seed in itertools.product(kinds, seeds):
        record = Chats(f"{name} {kind} {seed}").chat(kind)
        trained[kind] = check_sft(record, name, tokenizer)
        check_prompt(record, name, tokenizer)
    return trained


@pytest.mark.parametrize(("place", "name"), list(enumerate(NAMES))[::3])
def test_tokens_and_masks_are_those_of_transformers_or_the_record_is_refused(place, name):
    """A third of the templates, a third of the kinds with each."""
    check(name, KINDS[place % 4 :: 4], range(1))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_masks_of_many_chats(name):
    assert check(name, KINDS, range(10))["plain"]
