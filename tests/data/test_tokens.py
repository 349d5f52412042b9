"""Many texts through the tokenizer at once: the same tokens, and the text that it fails on is known."""

import numpy as np
import pytest

from jlora.data.tokens import Text, Tokens, encode_alone, encode_together, plain_text, tokenize
from jlora.errors import UserError


def reading(text):
    [found] = yield [Text(text)]
    [again] = yield [Text(text * 2)]
    if text == "odd":
        raise UserError("found odd")
    return len(found.ids), len(again.ids)


def test_generators_get_the_tokens_of_their_own_texts_in_order(tokenizer):
    texts = ["a" * (1 + number % 7) for number in range(600)]
    found = list(encode_together(texts, reading, tokenizer))
    assert found == [(text, (len(text), 2 * len(text))) for text in texts]


def test_only_the_record_whose_text_cannot_be_read_has_an_error(tokenizer):
    found = dict(encode_together(["a", "odd", "\ud800", "bb"], reading, tokenizer))
    assert (found["a"], found["bb"]) == ((1, 2), (2, 4))
    assert str(found["odd"]) == "found odd"
    assert "half of a character" in str(found["\ud800"])
    with pytest.raises(UserError, match="half of a character"):
        encode_alone(reading("\ud800"), tokenizer)


def test_texts_with_and_without_special_tokens_are_tokenized_together(tokenizer):
    special, plain = tokenize([Text("a", special=True), Text("<|im_end|>é")], tokenizer)
    assert special.ids.tolist() == tokenizer("a")["input_ids"]
    np.testing.assert_array_equal(plain.offsets, [[0, 10], [10, 11], [10, 11]])
    assert Tokens([1, 2]).offsets is None
    assert plain_text("a", tokenizer).special
