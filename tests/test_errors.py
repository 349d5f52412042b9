"""Faults of one kind are said once, with a count and the first three places."""

import pytest

from jlora.errors import UserError, describe_faults, first_few, group_faults, number_of, raise_all, size_of


@pytest.mark.parametrize(("count", "text"), [(0, "0 steps"), (1, "1 step"), (2, "2 steps"), (12345, "12,345 steps")])
def test_one_is_singular(count, text):
    assert number_of(count, "step") == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0.0 KiB"), (1500, "1.5 KiB"), (2**20, "1.0 MiB"), (2**28 - 1, "256.0 MiB"), (2**28, "0.25 GiB")],
)
def test_sizes_have_the_unit_that_leaves_few_digits(count, text):
    assert size_of(count) == text


def test_equal_faults_share_a_line_with_three_places_and_a_count():
    found = [(f"a:{number}", "found a list, expected text") for number in range(1, 1001)] + [("a:7", "found no role")]
    assert group_faults(found) == [
        "a:1, :2, :3 and 997 more: found a list, expected text",
        "a:7: found no role",
    ]
    assert group_faults(found[:3]) == ["a:1, :2, :3: found a list, expected text"]
    assert group_faults([*found[:2], *found[:2]]) == ["a:1, :2: found a list, expected text"]
    assert group_faults([("record 3", "bad"), ("record 9", "bad")]) == ["record 3, record 9: bad"]
    assert group_faults([("a:b.json:1 (record 1)", "bad"), ("c:9", "bad")]) == ["a:b.json:1 (record 1), c:9: bad"]


def test_faults_that_differ_in_values_alone_are_one_kind():
    found = [(f"a:{n}", f"found 'it\\'s {n}' and {n / 2}, expected messages[{n}]") for n in range(10)]
    lines = group_faults([*found, ("a:11", "found nothing")])
    assert lines == [f"{place}: {fault}" for place, fault in found[:3]] + [
        "... and 7 more of this kind",
        "a:11: found nothing",
    ]
    assert group_faults(found[:3]) == lines[:3]


def test_a_long_list_ends_with_the_number_of_the_rest():
    message = describe_faults("title", [f"fault {'x' * n}" for n in range(60)])
    assert len(message.splitlines()) == 52
    assert message.endswith("... and 10 more")


def test_raise_all_says_each_fault_once():
    raise_all([])
    with pytest.raises(UserError) as error:
        raise_all(["one", "two", "one"])
    assert str(error.value) == "one\ntwo"


def test_the_first_few_have_an_ellipsis_only_if_there_are_more():
    assert [first_few(range(count)) for count in (0, 3, 4)] == ["", "0, 1, 2", "0, 1, 2, …"]
