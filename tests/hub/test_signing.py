"""Texts that jlora knows again, until anyone changes them."""

import pytest

from jlora.hub.signing import is_as_signed, signed, unsigned

TEXT = "FROM ./m.gguf\nSYSTEM Zürich\n"


@pytest.mark.parametrize("comment", ["# {}", "<!-- {} -->"])
def test_a_signed_text_is_known_again_until_it_is_changed(comment):
    text = signed(TEXT, comment)
    assert text.startswith(TEXT) and text.count("\n") == TEXT.count("\n") + 1
    assert is_as_signed(text) and is_as_signed(signed("", comment)) and unsigned(text) == TEXT
    changed = (TEXT, "", text + "PARAMETER seed 1\n", "PARAMETER seed 1\n" + text, text.replace("Z", "z"), text[:-1])
    assert not any(map(is_as_signed, changed))
    assert not is_as_signed(TEXT + text) and is_as_signed(signed(text, comment))
