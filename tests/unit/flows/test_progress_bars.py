"""Off a terminal, progress is a line now and then."""

import io

from rich.console import Console

from flows import progress_bars


def lines(monkeypatch, *, seconds):
    clock = iter(range(0, 1000, seconds))
    monkeypatch.setattr(progress_bars.time, "monotonic", lambda: next(clock))
    written = io.StringIO()
    with progress_bars.ProgressBars(Console(file=written)) as bars:
        bars.advance("encode", 0, 40)
        for _ in range(3):
            bars.advance("encode", 10, None)
        bars.advance("publish", 1, None)
    return written.getvalue().splitlines()


def test_a_long_stage_says_how_far_it_is(monkeypatch):
    assert lines(monkeypatch, seconds=20)[:2] == ["encode: 10 tokens", "encode: 20 tokens"]


def test_what_stages_say_is_a_line_of_its_own():
    written = io.StringIO()
    with progress_bars.ProgressBars(Console(file=written, soft_wrap=True)) as bars:
        bars.say("cannot read s3://bucket/[a]: no answer")
    assert written.getvalue() == "cannot read s3://bucket/[a]: no answer\n"


def test_a_quick_command_says_nothing(monkeypatch):
    assert lines(monkeypatch, seconds=1) == []
