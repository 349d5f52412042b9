import io

import pytest

from jlora.train.reporting.progress import Counting, Progress, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(stream, *, total, start=0, seconds_a_step=1.0):
    now = [0.0]
    with Progress(stream, clock=lambda: now[0]) as progress:
        progress.start(total, start)
        for step in range(start + 1, total + 1):
            now[0] += seconds_a_step
            progress.update(step, {"loss": 2.0, "tokens_per_second": 12345.6})
    return stream.getvalue()


def test_plain_lines_are_few_and_hold_loss_speed_and_time_left():
    lines = run(io.StringIO(), total=100).splitlines()
    assert lines[0] == "step 1/100  loss 2.0000  12,346 tokens/s"
    assert lines[1] == "step 16/100  loss 2.0000  12,346 tokens/s  1m24s left"
    assert lines[-1] == "step 100/100  loss 2.0000  12,346 tokens/s"
    assert len(lines) == 8


def test_a_resumed_run_says_so_and_counts_on():
    lines = run(io.StringIO(), total=10, start=8).splitlines()
    assert lines[0] == "resuming after step 8 of 10"
    assert lines[1].startswith("step 9/10")
    assert run(io.StringIO(), total=10, start=10) == "finished already, after 10 steps: nothing is trained\n"


def test_the_time_of_the_first_step_is_not_counted():
    now = [0.0]
    stream = io.StringIO()
    progress = Progress(stream, clock=lambda: now[0])
    progress.start(4)
    for now[0], step in [(100.0, 1), (120.0, 2)]:
        progress.update(step, {})
    assert stream.getvalue().splitlines()[-1] == "step 2/4  40s left"


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    text = run(Terminal(), total=5)
    assert "5/5" in text
    assert "loss 2.0000" in text


def count(stream, share):
    now = [0.0]
    with Progress(stream, clock=lambda: now[0]).counting("encoding [a].jsonl") as told:
        for done in range(1, 101):
            now[0] = done * 1.0
            told(20 * done, share and share * done)
    return stream.getvalue()


def test_what_is_done_before_the_run_is_told_now_and_then():
    lines = count(io.StringIO(), None).splitlines()
    assert lines[:2] == [f"encoding [a].jsonl: {records} records, 20 a second" for records in (300, 600)]
    assert len(lines) == 6
    [first, *_, last] = count(io.StringIO(), 0.01).splitlines()
    assert first == "encoding [a].jsonl (15%): 300 records, 20 a second, 1m25s left"
    assert last == "encoding [a].jsonl (90%): 1,800 records, 20 a second, 10s left"


def test_on_a_terminal_it_is_a_bar_that_goes_away(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    text = count(Terminal(), 0.01)
    assert "encoding [a].jsonl" in text
    assert "2,000 records, 20 a second" in text
    assert text.endswith("\x1b[2K")  # the line is cleared
    notes = []
    with Counting("encoding", notes.append) as told:
        told(1, 0.5)
    assert notes == []


def test_closing_before_starting_and_twice_is_fine():
    stream = io.StringIO()
    progress = Progress(stream)
    progress.close()
    progress.close()
    assert stream.getvalue() == ""


def test_notes_are_shown_as_they_are():
    stream = io.StringIO()
    Progress(stream).note("saved [bold]x[/bold] " + "y" * 200)
    assert stream.getvalue() == "saved [bold]x[/bold] " + "y" * 200 + "\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (200, "3m20s"), (3600, "1h00m"), (93784, "26h03m")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
