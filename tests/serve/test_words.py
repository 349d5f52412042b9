import pytest

from jlora.serve.words import Words

TEXT = "Grüße, 世界 🌍! end of it"


@pytest.fixture
def tokens(byte_tokenizer):
    return byte_tokenizer(TEXT)["input_ids"]


def told(words, tokens):
    return [*map(words.add, tokens), words.end()]


def test_characters_come_out_whole(byte_tokenizer, tokens):
    pieces = told(Words(byte_tokenizer), tokens)
    assert len(tokens) > len(TEXT) and [piece for piece in pieces if piece] == list(TEXT)


def test_bytes_that_are_no_text_are_what_the_tokenizer_makes_of_them(byte_tokenizer, tokens):
    broken = [*tokens[:3], tokens[20], *tokens[3:-6], *tokens[12:14]]
    assert "".join(told(Words(byte_tokenizer), broken)) == byte_tokenizer.decode(broken)


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["end", "世"], "Grüße, "),
        (["界 🌍"], "Grüße, 世"),
        (["never", "it!"], TEXT),  # "it" is kept back until nothing follows
        (["it", "end of it"], "Grüße, 世界 🌍! "),  # found at once: the earlier one
        (["t"], TEXT[:-1]),
    ],
)
def test_a_text_ends_before_its_stop_string_of_which_nothing_comes_out(byte_tokenizer, tokens, stops, expected):
    words = Words(byte_tokenizer, stops)
    pieces = told(words, tokens)
    assert "".join(pieces) == expected and words.stopped == (expected != TEXT)
    assert not any("ver".startswith(piece) for piece in pieces if piece)


@pytest.mark.parametrize(("kept", "expected"), [((), "ab"), ((0,), "a<|end|>b"), ((1,), "ab")])
def test_special_tokens_are_told_if_they_are_kept(byte_tokenizer, kept, expected):
    tokens = [token for text in ("a", "<|end|>", "b") for token in byte_tokenizer(text)["input_ids"]]
    assert "".join(told(Words(byte_tokenizer, kept=kept), tokens)) == expected
