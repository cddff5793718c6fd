"""Remote workers, called as a scheduler would, in this process."""

import logging
import subprocess
import sys
import threading
import warnings

import pytest

from belt_tasks import object_stores, progress, telemetry
from belt_tasks.errors import ShardError
from belt_tasks.progress import StoppedError
from belt_tasks.remote_worker import Raised, RemoteWorker


@pytest.fixture
def worker():
    """Started, and what it changes in its process is put back."""
    level, handlers = logging.getLogger("belt_tasks").level, logging.getLogger().handlers[:]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "POLARS_MAX_THREADS"):
            patch.setenv(name, "1")
        worker = RemoteWorker(num_cores=1, share_of_gpu=0.0)
        worker.start({}, logging.INFO)
        yield worker
        worker._listening.close()
    logging.captureWarnings(capture=False)
    logging.getLogger().handlers[:] = handlers
    logging.getLogger("belt_tasks").setLevel(level)
    progress.go_on()
    object_stores.configure({})


def test_a_call_returns_what_its_function_does(worker):
    assert worker.call(divmod, (7, 3), {}) == (2, 1)


def test_a_report_is_all_since_the_last_one(worker):
    def stage():
        progress.advance("encode", 2, num_more=5)
        progress.advance("encode", 3)
        progress.advance("tokenize", 0, num_more=1)
        progress.say("words")
        logging.getLogger("belt_tasks.test").info("number %d", 1)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("look out", stacklevel=1)

    worker.call(stage, (), {})
    report = worker.report()

    assert set(report.advanced) == {("encode", 5, 5), ("tokenize", 0, 1)}
    assert report.said == ("words",)
    number, warning = (record.getMessage() for record in report.logged)
    assert number == "number 1"
    assert "UserWarning: look out" in warning
    again = worker.report()
    assert (again.advanced, again.said, again.logged) == ((), (), ())


def test_what_would_be_metered_is_in_the_report_and_nowhere_else(worker, monkeypatch, tmp_path):
    monkeypatch.setenv("BELT_METRICS_TEXTFILE", str(tmp_path / "belt.prom"))

    worker.call(telemetry.shard_ended, ("score", "reused"), {})

    assert worker.report().metered == (("shard_ended", ("score", "reused"), {}),)
    assert worker.report().metered == ()
    assert list(tmp_path.iterdir()) == []


def test_an_error_is_a_value_that_can_be_sent(worker):
    class CannotBeCopiedError(Exception):
        def __init__(self, one, two):
            super().__init__(f"{one} and {two}")

    def stage(error):
        raise error

    raised = worker.call(stage, (ShardError("shard 7: broken"),), {})
    assert isinstance(raised, Raised)
    assert (type(raised.error), str(raised.error)) == (ShardError, "shard 7: broken")
    assert not hasattr(raised.error, "__notes__")
    raised = worker.call(stage, (ValueError("a bug"),), {})
    assert "in stage" in raised.error.__notes__[0]
    raised = worker.call(stage, (CannotBeCopiedError(1, 2),), {})
    assert (type(raised.error), str(raised.error)) == (RuntimeError, "CannotBeCopiedError: 1 and 2")


def test_a_call_is_stopped_at_its_next_report_and_the_next_call_is_not(worker):
    reached = threading.Event()

    def endless():
        while True:
            progress.advance("encode", 1)
            reached.set()

    found = []
    thread = threading.Thread(target=lambda: found.append(worker.call(endless, (), {})))
    thread.start()
    reached.wait()
    worker.stop()
    thread.join()

    assert isinstance(found[0].error, StoppedError)
    assert worker.call(progress.advance, ("encode", 1), {}) is None


def test_the_libraries_take_the_cores_that_the_worker_has():
    code = (
        "from belt_tasks.remote_worker import RemoteWorker; import sys; assert 'torch' not in sys.modules;"
        "RemoteWorker(num_cores=3, share_of_gpu=0.0).start({}, 20);"
        "import torch, polars, pyarrow; print(torch.get_num_threads(), polars.thread_pool_size(), pyarrow.cpu_count())"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["3", "3", "3"]
