import io

import pytest

from jlora.train.reporting.progress import Progress, duration


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
    assert run(io.StringIO(), total=10, start=10) == "finished already: all 10 steps are done, and nothing is trained\n"


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
