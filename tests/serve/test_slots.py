"""Who gets which row, and what is read for whom. No model takes part."""

import pytest

from jlora.serve import Request
from jlora.serve.shelf import Held
from jlora.serve.slots import Job, Slots, common
from jlora.serve.words import Words

LAW, SHOP = Held("law", 0, "law"), Held("shop", 1, "shop")
SYSTEM = list(range(100, 150))


def job(tokens, held=LAW):
    return Job(Request(tokens, 8), lambda piece: None, Words(None), held)


def answered(slots, tokens, held=LAW, drawn=()):
    """A slot in which a job was answered and is over."""
    slot = slots.place(job(tokens, held))
    slot.job.drawn, slot.fed = list(drawn), len(tokens) + len(drawn) - 1
    slots.release(slot)
    return slot


@pytest.mark.parametrize("length", [0, 1, 7, 8])
def test_the_common_beginning(length):
    assert common([*range(length), 50, 51], [*range(length), 60]) == length
    assert common(list(range(length)), list(range(9))) == length


def test_a_chat_goes_on_in_its_own_row():
    slots = Slots(3)
    first = [*SYSTEM, *range(20)]
    chat, other = answered(slots, first, drawn=[3, 4]), answered(slots, [*SYSTEM, *range(40, 60)])
    found = slots.place(job([*first, 3, 4, 5, 6]))
    # The last token drawn was never read.
    assert found is chat is not other and found.fed == found.job.cached == len(first) + 1


def test_another_chat_takes_the_row_that_was_used_longest_ago_and_copies_what_they_share():
    slots = Slots(2)
    old, new = answered(slots, [9] * 60), answered(slots, [*SYSTEM, *range(60)])
    found = slots.place(job([*SYSTEM, 77, 78]))
    assert found is old and not found.fed and slots.source(found) == (new, len(SYSTEM))


def test_what_was_read_with_another_adapter_is_of_no_use():
    slots = Slots(2)
    answered(slots, SYSTEM, SHOP)
    slot = slots.place(job(SYSTEM))
    assert not slot.fed and slots.source(slot) is None


def test_the_last_token_of_a_prompt_is_left_for_the_step():
    slots = Slots(1)
    answered(slots, SYSTEM, drawn=[1, 2])
    slot = slots.place(job(SYSTEM))
    assert slot.fed == len(SYSTEM) - 1 and slot.unread == 0 and slots.decoding == [slot]


def test_a_state_that_cannot_be_cut_short_serves_only_what_goes_on_from_its_end():
    slots = Slots(1, whole=True)
    answered(slots, SYSTEM, drawn=[1, 2])
    assert slots.place(job([*SYSTEM, 1, 2, 3])).fed == len(SYSTEM) + 1
    slots = Slots(1, whole=True)
    answered(slots, SYSTEM, drawn=[1, 2])
    assert slots.place(job([*SYSTEM, 1])).fed == 0
    slots = Slots(1, whole=True)
    slot = answered(slots, SYSTEM, drawn=[1, 2])
    slot.job, slot.fed = job(SYSTEM), len(SYSTEM) + 5  # a step was under way when it was cancelled
    slots.release(slot)
    assert not slot.held


def test_who_shares_a_prefix_waits_until_one_has_read_it():
    slots = Slots(4)
    first, second, other, third = (
        slots.place(job(tokens, held))
        for tokens, held in (
            ([*SYSTEM, *range(300)], LAW),
            ([*SYSTEM, 500], LAW),
            ([*SYSTEM, 600], SHOP),
            ([700] * 30, LAW),
        )
    )
    assert set(slots.next_readers()) == {first, other, third}
    first.fed = len(SYSTEM)
    assert set(slots.next_readers()) == {first, second, other, third}
    assert slots.source(second) == (first, len(SYSTEM))


def test_short_prompts_overtake_a_long_one_that_still_gets_every_other_turn():
    slots = Slots(3)
    long, middle, short = (slots.place(job([token] * size)) for token, size in ((1, 400), (2, 60), (3, 20)))
    assert [slots.next_readers()[0] for _ in range(4)] == [short, long, short, long]
    assert slots.next_readers() == [short, long, middle]
