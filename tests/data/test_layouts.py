"""Chats that are written as others before them: rendered once, with the masks that marks would give."""

import numpy as np
import pytest

from jlora.data import encode, encode_preferences

HEAD = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = HEAD + "{{ m['content'] }}<|im_end|>\n{% endfor %}" + ASKS
TRIMMED = PLAIN.replace("m['content']", "m['content'] | trim")
THINKING = (
    HEAD + "{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}" + ASKS.replace("ant\n", "ant\n<think>\n\n</think>\n\n")
)
COUNTS = HEAD + "{{ m['content'] | length }} {{ m['content'] }}<|im_end|>\n{% endfor %}" + ASKS


class Counting:
    """A tokenizer that counts the messages that are rendered."""

    def __init__(self, tokenizer):
        self.tokenizer, self.rendered = tokenizer, 0

    def apply_chat_template(self, messages, **settings):
        self.rendered += len(messages)
        return self.tokenizer.apply_chat_template(messages, **settings)

    def __call__(self, texts, **settings):
        return self.tokenizer(texts, **settings)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


def chat(*texts, system=None):
    messages = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]
    return {"messages": [{"role": "system", "content": system}] * (system is not None) + messages}


SPACED = ("so\n", " or so.", "then?", "\n\nThen. ")
TRICKY = ("assistant\n<|im_end|> a", "user <|im_end|>\n<|im_start|>assistant\n no", "<b>bold</b>", "[x] y")
CHATS = [
    chat("a?", "A.", "b?", "B."),
    chat("a?", "A."),
    chat("s?", "S.", system="Short."),
    chat(*SPACED),
    chat(*TRICKY),
]


@pytest.mark.parametrize("template", [PLAIN, TRIMMED, THINKING, COUNTS])
def test_chats_between_others_have_the_tokens_and_masks_that_they_have_alone(make_tokenizer, template):
    tokenizer = make_tokenizer(template, "<|im_end|>")
    records = [CHATS[index] for index in np.random.default_rng(0).permutation(np.repeat(np.arange(len(CHATS)), 8))]
    found, _ = encode(records, tokenizer, seq_len=999)
    for record, example in zip(records, found, strict=True):
        [alone], _ = encode([record], tokenizer, seq_len=999)
        np.testing.assert_array_equal(example.tokens, alone.tokens)
        np.testing.assert_array_equal(example.trained, alone.trained)


def test_chats_of_a_known_kind_are_rendered_once(make_tokenizer):
    tokenizer = Counting(make_tokenizer(PLAIN, "<|im_end|>"))
    encode([chat(*"aAbB")] * 4, tokenizer, seq_len=999)
    first = tokenizer.rendered
    encode([chat(*"aAbB")] * 104, tokenizer, seq_len=999)
    assert tokenizer.rendered == 2 * first + 100 * 4


def test_what_was_learned_with_other_variables_is_not_used(make_tokenizer):
    """The prompt's end depends on a variable here; what stands before the answer does not."""
    asks = "{% if add_generation_prompt %}<|im_start|>assistant\n{% if deep %}So: {% endif %}{% endif %}"
    tokenizer = make_tokenizer(
        HEAD + "{% if m['role'] == 'assistant' %}So: {% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}" + asks,
        "<|im_end|>",
    )
    plain = chat("a?", "A.")
    deep = plain | {"chat_template_kwargs": {"deep": True}}
    found, _ = encode([plain] * 9 + [deep] * 9, tokenizer, seq_len=99)
    words = {tokenizer.decode(example.tokens[example.trained]) for example in found[:9]}
    assert words == {"So: A.<|im_end|>"}
    assert {tokenizer.decode(example.tokens[example.trained]) for example in found[9:]} == {"A.<|im_end|>"}


def test_pairs_of_a_known_kind_are_rendered_once_a_side(make_tokenizer):
    tokenizer = Counting(make_tokenizer(PLAIN, "<|im_end|>"))
    *prompt, answer = chat("a?", "A.", "b?", "B.")["messages"]
    pair = {"prompt": prompt, "chosen": [answer], "rejected": [answer | {"content": "C."}]}
    items, _ = encode_preferences([pair] * 4, tokenizer, seq_len=999)
    first = tokenizer.rendered
    more, _ = encode_preferences([pair] * 24, tokenizer, seq_len=999)
    assert tokenizer.rendered == 2 * first + 20 * 2 * 4
    for one, other in zip(items[0].documents, more[-1].documents, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.trained, other.trained)
