"""Adapters that come and go around the requests that need them."""

import pytest

from jlora.serve.shelf import Shelf


def test_a_place_is_free_only_when_nobody_needs_the_adapter_there(make_bank, make_adapter):
    shelf = Shelf(make_bank(places=4))
    law = shelf.get("law")
    shelf.take(law), shelf.take(law)
    shelf.put("law", make_adapter(5))
    assert shelf.get("law") is not law and shelf.place(shelf.get("law")) != shelf.place(law)
    with pytest.raises(ValueError, match="4 places, none of them free, 1 as soon as"):
        shelf.put("more", make_adapter(6))
    shelf.give_back(law)
    assert None not in shelf.bank.names
    shelf.give_back(law)
    assert shelf.bank.names.count(None) == 1
    shelf.put("more", make_adapter(6))
    assert shelf.names == ["shop", "law", "verse", "more"] and shelf.place(shelf.get("more")) == law.number
    assert shelf.place(None) == 4


def test_one_that_nobody_needs_is_replaced_in_a_full_bank_and_stays_if_the_new_one_does_not_fit(
    make_bank, make_adapter
):
    shelf = Shelf(make_bank(places=3))
    law = shelf.get("law")
    with pytest.raises(ValueError, match="adapter 'law' does not fit"):
        shelf.put("law", make_adapter(5, r=9))
    assert shelf.get("law") is law and shelf.bank.names == ("shop", "law", "verse")
    shelf.put("law", make_adapter(5))
    assert shelf.get("law").number == law.number and shelf.get("law").key != law.key


def test_a_base_alone_has_none():
    with pytest.raises(KeyError, match="no adapter is called 'law'; there is none"):
        Shelf(None).get("law")
    with pytest.raises(ValueError, match="started with a base alone"):
        Shelf(None).put("law", {})
