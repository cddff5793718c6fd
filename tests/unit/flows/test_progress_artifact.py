"""The words of the progress artifact: how much, how fast, until when."""

from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from flows.progress_artifact import Pace

NOON = datetime(2026, 3, 31, 12, tzinfo=UTC)


class Clock:
    """Seconds that go by when it is told so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_a_run_tells_how_much_how_fast_and_until_when():
    clock = Clock()
    pace = Pace(clock)
    pace.advance("tokenize", 0, 5000)
    pace.advance("score", 0, 5000)
    for _ in range(11):
        pace.advance("tokenize", 100, None)
        pace.advance("encode", 0, 60_000)
        pace.advance("encode", 60_000, None)
        pace.advance("score", 100, None)
        clock.seconds += 2.0

    assert pace.percentage == 22.0
    assert pace.words(NOON) == (
        "score: 1,100 of 5,000 documents; 50.0 documents per second; 30,000 tokens per second; "
        "about 0:01:18 left, until 2026-03-31 12:01 UTC (as of 12:00:00 UTC)"
    )


def test_what_an_earlier_attempt_did_is_neither_done_nor_to_do():
    clock = Clock()
    pace = Pace(clock)
    pace.advance("score", 0, 30)
    for _ in range(2):  # shards that are there
        pace.advance("score", 0, -10)
    for _ in range(6):
        clock.seconds += 1.0
        pace.advance("score", 1, None)

    assert pace.percentage == 60.0
    assert pace.words(NOON).startswith("score: 6 of 10 documents; 1.0 documents per second; about 0:00:04 left")


def test_a_run_with_nothing_to_do_tells_nothing():
    pace = Pace()
    pace.advance("tokenize", 0, 0)
    pace.advance("score", 0, None)

    assert (pace.percentage, pace.words(NOON)) == (None, "")


def test_a_run_is_as_far_as_its_last_stage():
    pace = Pace()
    pace.advance("tokenize", 0, 8)
    pace.advance("tokenize", 8, None)
    assert pace.percentage == 100.0
    pace.advance("fine-tune", 0, 16)
    assert pace.percentage == 0.0


@given(
    parts=st.lists(st.lists(st.integers(1, 50), max_size=5), min_size=1, max_size=5),
    seconds=st.floats(0, 1e5, allow_nan=False),
)
def test_all_parts_count_and_all_done_is_all(parts, seconds):
    clock = Clock()
    pace = Pace(clock)
    for part in parts:  # such as a corpus that is published in steps
        pace.advance("score", 0, sum(part))
        for number in part:
            clock.seconds += seconds
            pace.advance("score", number, None)
    total = sum(map(sum, parts))

    assert pace.percentage == (100.0 if total else None)
    assert total == 0 or pace.words(NOON).startswith(f"score: {total:,} of {total:,} documents")
