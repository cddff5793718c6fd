"""Objects that are only created: of many writers one succeeds, at every store, whatever becomes of its answer."""

import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest

from belt_tasks import object_stores, storage
from belt_tasks.errors import ConfigError, TransientError
from tests.integration.fault_proxy import Request, fault_proxy

NUM_WRITERS = 8


@pytest.fixture(params=["local", "s3"])
def shared(request, tmp_path):
    """An empty place that many processes may write to, on disk and on a real S3 server."""
    return str(tmp_path / "root") if request.param == "local" else request.getfixturevalue("s3_root")


def everything(uri):
    filesystem, path = storage._resolve(uri)
    return sorted(name.removeprefix(path).lstrip("/") for name in filesystem.find(path))


def test_what_is_there_stays(shared):
    uri = storage.join(shared, "deep", "a.bin")

    assert storage.create_bytes(uri, b"first")
    assert not storage.create_bytes(uri, b"second")

    assert storage.read_bytes(uri) == b"first"
    assert everything(shared) == ["deep/a.bin"]


def test_the_very_same_bytes_are_ours(shared):
    uri = storage.join(shared, "a.bin")

    assert storage.create_bytes(uri, b"mine")
    assert storage.create_bytes(uri, b"mine")


def test_an_object_may_be_empty(shared):
    uri = storage.join(shared, "a.bin")

    assert storage.create_bytes(uri, b"")
    assert not storage.create_bytes(uri, b"x")
    assert storage.read_bytes(uri) == b""


def test_a_store_that_lets_two_win_is_refused():
    with pytest.raises(ConfigError, match=r"^memory:/+somewhere/a: where two may write at once, one has to win"):
        storage.create_bytes("memory://somewhere/a", b"mine")


def test_of_many_threads_one_succeeds(shared):
    for number in range(5):
        uri, barrier = storage.join(shared, f"{number}.bin"), threading.Barrier(NUM_WRITERS)

        def write(writer, uri=uri, barrier=barrier):
            barrier.wait()
            return storage.create_bytes(uri, f"writer {writer}".encode())

        with ThreadPoolExecutor(NUM_WRITERS) as threads:
            won = list(threads.map(write, range(NUM_WRITERS)))

        assert won.count(True) == 1
        assert storage.read_bytes(uri) == f"writer {won.index(True)}".encode()
    assert everything(shared) == [f"{number}.bin" for number in range(5)]


def write_in_process(root, writer, barrier, told):
    won = []
    for number in range(10):
        barrier.wait()
        won.append(storage.create_bytes(storage.join(root, f"{number}.bin"), f"writer {writer}".encode()))
    told.put((writer, won))


def test_of_many_processes_one_succeeds(shared):
    processes = multiprocessing.get_context("spawn")
    barrier, told = processes.Barrier(4), processes.Queue()
    started = [processes.Process(target=write_in_process, args=(shared, i, barrier, told)) for i in range(4)]
    for process in started:
        process.start()

    won = dict(told.get() for _ in started)

    for process in started:
        process.join()
    for number in range(10):
        (winner,) = [writer for writer, results in won.items() if results[number]]
        assert storage.read_bytes(storage.join(shared, f"{number}.bin")) == f"writer {winner}".encode()


def through(proxy, monkeypatch):
    """Have belt's requests go by the proxy."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    object_stores.configure({})


@pytest.mark.parametrize("there_before", [False, True])
def test_a_lost_answer_makes_no_difference(s3, s3_root, monkeypatch, there_before):
    uri = f"{s3_root}/a.bin"
    if there_before:
        storage.create_bytes(uri, b"another's")
    puts = count(1)

    def lose_the_first_answer(request: Request) -> bytes | None:
        answer = request.forward()
        return None if request.method == "PUT" and next(puts) == 1 else answer

    with fault_proxy(s3.endpoint, lose_the_first_answer) as proxy:
        through(proxy, monkeypatch)
        assert storage.create_bytes(uri, b"mine") is not there_before

    assert any(method == "PUT" for method, _ in proxy.requests)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    object_stores.configure({})
    assert storage.read_bytes(uri) == (b"another's" if there_before else b"mine")


@pytest.mark.parametrize("arrives", [False, True])
def test_where_no_put_is_ever_answered_what_is_there_decides(s3, s3_root, monkeypatch, arrives):
    uri = f"{s3_root}/a.bin"
    monkeypatch.setattr(object_stores, "RETRIES", object_stores.RETRIES | {"max_retries": 0})

    def never_answer(request: Request) -> bytes | None:
        if request.method != "PUT":
            return request.forward()
        if arrives:
            request.forward()
        return None

    with fault_proxy(s3.endpoint, never_answer) as proxy:
        through(proxy, monkeypatch)
        if arrives:
            assert storage.create_bytes(uri, b"mine")
        else:
            with pytest.raises(TransientError, match="cannot write"):
                storage.create_bytes(uri, b"mine")


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))

    with pytest.raises(ConfigError, match=r"cannot write .*a\.bin: No space left on device"):
        storage.create_bytes(str(tmp_path / "a.bin"), b"new")

    assert everything(str(tmp_path)) == []


def test_a_place_below_a_file_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(ConfigError, match=r"cannot write .*file/a\.bin: "):
        storage.create_bytes(str(tmp_path / "file" / "a.bin"), b"new")


@pytest.mark.usefixtures("s3")
def test_whoever_may_only_read_is_told(s3, s3_root, monkeypatch):
    for name, value in s3.environment("reader").items():
        monkeypatch.setenv(name, value)
    object_stores.configure({})

    with pytest.raises(ConfigError, match=r"cannot write .*a\.bin: .*Access"):
        storage.create_bytes(f"{s3_root}/a.bin", b"new")
