"""What hosts decide together."""

import jax

from jlora import sharding


def test_one_host_is_answered_at_once():
    vote = sharding.Vote()
    assert [vote(flag) for flag in (False, True, False)] == [False, True, False]


def test_several_hosts_hear_what_was_said_the_time_before(monkeypatch):
    """Two hosts that this process pretends to be; the answer of all eight devices is on each."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    vote = sharding.Vote()
    assert [vote(flag) for flag in (False, True, False, False)] == [False, False, True, False]
