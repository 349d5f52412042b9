"""Random chats through every chat template that TRL ships: tokens and masks are transformers', or the chat is refused.

Each word of a chat is there once, so that what is trained can be read off it.
"""

import functools
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
from jlora.data.template import template_ending
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
MARK = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")
# Of a chat that begins with an answer, the words alone are trained; and TRL marks no token that ends a call of Gemma's.
UNMARKED = dict.fromkeys(NAMES, ("first",)) | {
    "diffusion_gemma_training": ("first", *(kind for kind in KINDS if "calls" in kind))
}
MARKED = [name for name in NAMES if MARK.search((FOLDER / f"{name}.jinja").read_text())]


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
    marks = MARK.search(tokenizer.chat_template) is not None
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


def spans(mask, offsets):
    """(start, end) in the text of each run of masked tokens."""
    edges = np.flatnonzero(np.diff(np.pad(mask.astype(int), 1)))
    return [(int(offsets[first][0]), int(offsets[last - 1][1])) for first, last in edges.reshape(-1, 2)]


def headers(messages, text, openings, render):
    """The places in the text of what a prompt ends with, for each answer."""
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or not index:
            continue
        before = render(messages[:index], add_generation_prompt=True)
        if before.endswith(openings[0]):
            start = len(before) - len(openings[0])
            yield start, start + next((len(asked) for asked in openings if text.startswith(before[:start] + asked)), 0)


def shown(start, text, openings):
    """Where the marked words begin that a prompt does not end with: TRL marks "<think>" that Qwen's prompts have."""
    for asked in openings:
        if (place := text.find(asked, max(0, start - len(asked)), start + len(asked))) >= 0:
            return max(start, place + len(asked))
    return start


def check_marks(record, name, marked, unmarked):
    """Without its marks, what is trained of a template's chats is what they mark: of it, what a model has to write.

    That leaves out what a prompt ends with, and what follows the tokens that end an answer.
    """
    try:
        [example], _ = encode([record], unmarked, seq_len=10**6)
    except UserError:
        return False
    messages, variables = as_transformers(record, name)
    render = functools.partial(unmarked.apply_chat_template, tokenize=False, **variables)
    found = marked.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **variables)
    text, user = render(messages), as_transformers({"messages": [{"role": "user", "content": "tide"}]}, name)[0]
    offsets = np.array(unmarked(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"])
    opening = render(user, add_generation_prompt=True).removeprefix(render(user))
    pieces = re.findall(r"<[^<>]*>|\s+|[^<\s]+", opening)
    openings = ["".join(pieces[:count]) for count in range(len(pieces), 0, -1)] or [""]
    ending = unmarked.decode(template_ending(unmarked))
    expected = np.array(found["assistant_masks"], bool)
    for start, end in headers(messages, text, openings, render):
        expected &= (offsets[:, 1] <= start) | (offsets[:, 1] > end)
    for start, end in spans(expected, offsets):
        first, last = shown(start, text, openings), text.rfind(ending, start, end) if ending else -1
        last = end if last < 0 else last + len(ending)
        cut = (offsets[:, 1] > start) & (offsets[:, 1] <= end) & ((offsets[:, 1] <= first) | (offsets[:, 1] > last))
        expected &= ~cut
    trained = np.zeros_like(expected)
    length = min(len(trained), len(example.trained))
    trained[:length] = example.trained[:length]
    np.testing.assert_array_equal(trained, expected)
    return True


def check_marked(name, kinds, seeds):
    marked, unmarked, checked = build(name), build(name), {}
    unmarked.chat_template = MARK.sub(
        lambda mark: f"{{%{mark[1]} {'endif' if mark[2] else 'if true'} {mark[3]}%}}", marked.chat_template
    )
    for kind, seed in itertools.product(kinds, seeds):
        checked[kind] = check_marks(Chats(f"{name} {kind} {seed}").chat(kind), name, marked, unmarked)
    return checked


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


@pytest.mark.parametrize(("place", "name"), list(enumerate(MARKED)))
def test_what_is_trained_without_marks_is_what_trls_marks_say(place, name):
    kinds = [kind for kind in KINDS if kind not in UNMARKED[name]]
    assert any(check_marked(name, {"plain", *kinds[place % 3 :: 3]}, range(1)).values())


@pytest.mark.slow
@pytest.mark.parametrize("name", MARKED)
def test_what_is_trained_of_many_chats_is_what_trls_marks_say(name):
    assert check_marked(name, [kind for kind in KINDS if kind not in UNMARKED[name]], range(10))["plain"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_masks_of_many_chats(name):
    assert check(name, KINDS, range(10))["plain"]
