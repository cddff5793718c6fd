import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from belt_tasks import progress
from belt_tasks.errors import DeadlineError


@pytest.fixture(autouse=True)
def not_stopped():
    yield
    progress.go_on()


def in_thread(function):
    """The error that a function raises in a thread of its own, or None."""
    errors = []

    def call() -> None:
        try:
            function()
        except progress.StoppedError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return errors[0] if errors else None


def test_reports_reach_every_listener_while_it_listens():
    first, second = [], []

    progress.advance("encode", 1)
    with progress.listen(lambda *report: first.append(report)):
        progress.advance("encode", 0, num_more=7)
        with progress.listen(lambda *report: second.append(report)):
            progress.advance("encode", 3)
        progress.advance("tokenize", 2)
    progress.advance("encode", 4)

    assert first == [("encode", 0, 7), ("encode", 3, None), ("tokenize", 2, None)]
    assert second == [("encode", 3, None)]


def test_a_listener_leaves_when_its_block_raises():
    heard = []

    with pytest.raises(KeyError), progress.listen(lambda *report: heard.append(report)):
        raise KeyError
    progress.advance("encode", 1)

    assert heard == []


def test_stop_ends_threads_but_not_the_main_thread():
    heard = []
    progress.stop()

    with progress.listen(lambda *report: heard.append(report)):
        error = in_thread(lambda: progress.advance("encode", 1))
        progress.advance("tokenize", 2)

    assert str(error) == "encode: stopped before its end"
    assert heard == [("tokenize", 2, None)]


def test_go_on_takes_stop_back():
    progress.stop()
    progress.go_on()

    assert in_thread(lambda: progress.advance("encode", 1)) is None


def test_after_its_deadline_a_block_ends_at_the_next_report_in_any_thread():
    with progress.deadline(3600), progress.deadline(0), ThreadPoolExecutor(1) as thread:
        elsewhere = thread.submit(progress.advance, "tokenize", 1)
        with pytest.raises(DeadlineError, match=r"^encode: not done within the 0 s that the run may take"):
            progress.advance("encode", 1)
        with pytest.raises(DeadlineError, match=r"^tokenize: "):
            elsewhere.result()
    progress.advance("encode", 1)


def test_before_its_deadline_and_without_one_a_block_goes_on():
    with progress.deadline(3600), progress.deadline(None):
        progress.advance("encode", 1)
