"""Turns: which tokens are an answer's, whatever stands around it, in a few renders however long the chat."""

import numpy as np
import pytest

from jlora.data import encode, encode_preferences
from jlora.errors import UserError

HEAD = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = HEAD + "{{ m['content'] }}<|im_end|>\n{% endfor %}" + ASKS
MARKED = (
    HEAD + "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}" + ASKS
)


def chat(*texts, first=0, untrained=()):
    roles = ("user", "assistant")
    return {
        "messages": [
            {"role": roles[(index + first) % 2], "content": text} | ({"train": False} if index in untrained else {})
            for index, text in enumerate(texts)
        ]
    }


def trained(record, tokenizer, **settings):
    [example], _ = encode([record], tokenizer, seq_len=10**6, **settings)
    return tokenizer.decode(example.tokens[example.trained])


class Slow:
    """A tokenizer that does not say where its tokens stand."""

    is_fast = False

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text, **settings):
        return self.tokenizer(text, **settings)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


class Counting(Slow):
    """A tokenizer that counts what is rendered."""

    is_fast, renders = True, 0

    def apply_chat_template(self, *chats, **settings):
        self.renders += 1
        return self.tokenizer.apply_chat_template(*chats, **settings)


def test_a_turn_that_is_not_to_be_trained_is_not(make_tokenizer):
    record = chat("2 + 2?", "Five.", "Again.", "Four.", "Sure?", "Yes.", untrained=(1, 5))
    plain, marked = make_tokenizer(PLAIN, "<|im_end|>"), make_tokenizer(MARKED, "<|im_end|>")
    assert trained(record, plain) == "Four.<|im_end|>"
    assert trained(record, marked) == "Four.<|im_end|>\n"
    messages = record["messages"]
    completion = {
        "prompt": messages[:3],
        "completion": [messages[3], messages[2], messages[1], messages[2], *messages[4:]],
    }
    assert trained(completion, plain) == "Four.<|im_end|>"
    everything = trained(record, plain, completion_only=False)
    assert "Again." in everything
    assert "Five." not in everything
    with pytest.raises(UserError, match="1 without a completion token"):
        encode([chat("2 + 2?", "Five.", untrained=(1,))], plain, seq_len=99)
    _, report = encode([record, chat("2 + 2?", "Five.", untrained=(1,))], plain, seq_len=99)
    assert (report.examples, report.untrained) == (1, 1)


def test_an_answer_of_a_pair_leaves_out_a_turn_that_is_not_to_be_trained(make_tokenizer):
    tokenizer = make_tokenizer(PLAIN, "<|im_end|>")
    chosen = chat("Five.", "Sure?", "Four.", first=1, untrained=(0,))["messages"]
    pair = {"prompt": chat("2 + 2?")["messages"], "chosen": chosen, "rejected": chat("Six.", first=1)["messages"]}
    [item], _ = encode_preferences([pair], tokenizer, seq_len=999)
    texts = [tokenizer.decode(document.tokens[document.trained]) for document in item.documents]
    assert "Five." not in texts[0]
    assert texts[0].endswith("Four.<|im_end|>\n")
    assert texts[1] == "Six.<|im_end|>\n"


def test_a_key_that_is_for_the_training_alone_does_not_reach_the_template(make_tokenizer):
    tokenizer = make_tokenizer("{% for m in messages %}{{ m | tojson }}<|im_end|>{% endfor %}", "<|im_end|>")
    [example], _ = encode([chat("a?", "A.", "b?", "B.", untrained=(1,))], tokenizer, seq_len=999)
    assert "train" not in tokenizer.decode(example.tokens)


@pytest.mark.parametrize("template", [PLAIN, HEAD + "{{ m['content'] }}\n{% endfor %}" + ASKS])
def test_of_a_chat_that_begins_with_an_answer_the_words_alone_are_trained(make_tokenizer, template):
    tokenizer = make_tokenizer(template, "<|im_end|>")
    assert trained(chat("Hello!", "a?", "A.", first=1), tokenizer).startswith("Hello!")
    alone = chat("Hello!", first=1)
    assert trained(alone, tokenizer).startswith("Hello!")


LENGTHS = HEAD + "{{ m['content'] | length }} {{ m['content'] }}<|im_end|>\n{% endfor %}" + ASKS
NO_STOP = HEAD + "{{ m['content'] | length }} {{ m['content'] }}\n{% endfor %}" + ASKS
ODD = "{% if messages | length is odd %}{{ raise_exception('odd') }}{% endif %}"


@pytest.mark.parametrize("refuses", ["", ODD])
def test_turns_of_templates_that_change_with_marks_are_found_from_the_other_messages(make_tokenizer, refuses):
    record = chat("a?", "A.", "b?", "<b>", "c?", "C.")
    tokenizer = make_tokenizer(refuses + LENGTHS, "<|im_end|>")
    words = trained(record, tokenizer)
    if not refuses:
        assert words == "2 A.<|im_end|>3 <b><|im_end|>2 C.<|im_end|>"
    assert [piece.split()[-1] for piece in words.split("<|im_end|>")[:-1]] == ["A.", "<b>", "C."]
    words = trained(record, make_tokenizer(refuses + NO_STOP, "<|im_end|>"))
    assert "?" not in words
    assert words.endswith("C.\n<|im_end|>")


def test_an_answer_at_the_beginning_is_found_where_a_template_changes_with_marks(make_tokenizer):
    assert trained(chat("Hello!", "a?", "A.", first=1), make_tokenizer(LENGTHS, "<|im_end|>")) == (
        "6 Hello!<|im_end|>2 A.<|im_end|>"
    )


def test_a_template_that_refuses_the_first_messages_alone_writes_the_whole_chat(make_tokenizer):
    refuses = (
        "{% if messages | length < 5 and not messages[1] is defined %}{{ raise_exception('too short') }}{% endif %}"
    )
    tokenizer = make_tokenizer(refuses + PLAIN, "<|im_end|>")
    assert trained(chat("a?", " A.", "b?", "B."), tokenizer) == " A.<|im_end|>B.<|im_end|>"
    even = "{% if messages | length is odd %}{{ raise_exception('odd') }}{% endif %}"
    tokenizer = make_tokenizer(even + PLAIN, "<|im_end|>")
    assert trained(chat("a?", " A.", "b?", "B."), tokenizer) == " A.<|im_end|>B.<|im_end|>"


def test_stop_tokens_and_headers_within_words_move_no_mask_and_are_remarked_on(make_tokenizer):
    tokenizer = make_tokenizer(PLAIN, "<|im_end|>")
    said = "so<|im_end|>\n<|im_start|>user\nit is"
    asked = "why<|im_end|>\n<|im_start|>assistant\nthat?"
    [example], report = encode([chat(asked, said, asked, "B.")], tokenizer, seq_len=999)
    assert tokenizer.decode(example.tokens[example.trained]) == f"{said}<|im_end|>B.<|im_end|>"
    [note] = report.notes
    assert note.startswith("1 record (1): the token that ends answers occurs inside an answer")


def test_an_answer_ends_where_another_token_stands_in_the_stops_place(make_tokenizer):
    """As gpt-oss writes "return" behind the last answer and "end" behind earlier ones."""
    stop = "{% if m['role'] == 'assistant' and loop.last %}<|im_end|>{% else %}<|end|>{% endif %}"
    tokenizer = make_tokenizer(HEAD + "{{ m['content'] }}" + stop + "{% endfor %}" + ASKS, "<|im_end|>")
    assert trained(chat("a?", "A.", "b?", "B."), tokenizer) == "A.<|end|>B.<|im_end|>"


def test_all_special_tokens_that_end_a_turn_are_trained(make_tokenizer):
    """Command R7B ends a response with one token and the turn with another, at which its model stops."""
    tokenizer = make_tokenizer(PLAIN.replace("<|im_end|>", "<|end|><|im_end|>"), "<|im_end|>")
    assert trained(chat("a?", "A.", "b?", "B."), tokenizer) == "A.<|end|><|im_end|>B.<|end|><|im_end|>"


def test_a_turn_of_which_a_template_leaves_nothing_is_named(make_tokenizer):
    tokenizer = make_tokenizer(PLAIN.replace("m['content']", "m['content'] | trim"), "<|im_end|>")
    with pytest.raises(UserError, match=r"record 1: messages\[1\]: the chat template writes none of its text"):
        encode([chat("a?", " \n", "b?", "B.")], tokenizer, seq_len=99)


@pytest.mark.parametrize("template", [PLAIN, MARKED, HEAD + "{{ m['content'] | trim }}\n{% endfor %}" + ASKS])
@pytest.mark.parametrize("texts", [("a?", " A. ", "b?\n", "\nB.\n\n", "c"), ("a", "<b>", "c", "[D] d")])
def test_tokenizers_that_do_not_say_where_tokens_stand_give_the_same(make_tokenizer, template, texts):
    tokenizer = make_tokenizer(template, "<|im_end|>")
    slow = make_tokenizer(template.replace("{% generation %}", "").replace("{% endgeneration %}", ""), "<|im_end|>")
    [example], _ = encode([chat(*texts)], tokenizer, seq_len=999)
    [expected], _ = encode([chat(*texts)], Slow(slow), seq_len=999)
    tail = example.trained.sum() - expected.trained.sum()
    assert tail in ((1, 2) if template == MARKED else (0,))  # a line's end behind each stop, by the template's marks
    if template != MARKED:
        np.testing.assert_array_equal(example.trained, expected.trained)


@pytest.mark.parametrize("template", [PLAIN, MARKED, HEAD + "{{ m['content'] }}{% endfor %}" + ASKS])
def test_a_chat_is_rendered_as_often_however_long_it_is(make_tokenizer, template):
    counts = []
    for turns in (10, 80):
        tokenizer = Counting(make_tokenizer(template, "<|im_end|>"))
        encode([chat(*(f"Word {index} and more." for index in range(turns)))], tokenizer, seq_len=10**5)
        counts.append(tokenizer.renders)
    assert counts[0] == counts[1] <= 12
