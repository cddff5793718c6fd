import threading

import pytest

from belt_tasks import progress


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
