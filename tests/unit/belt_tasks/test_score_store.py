"""The score store: what went in comes out bit for bit, memory stays flat, and nothing is left behind."""

import gc
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from belt_tasks import score_store
from belt_tasks.score_store import MOST_PARAMETERS, ScoreStore, StoredScore

PATIENCE_S = 100.0  # of a wait that ends at once unless the law is broken


def fingerprint(number):
    return f"{number:064x}"


def score(number, num_labels=3):
    """A score that no other number has."""
    return StoredScore(logits_L=np.full(num_labels, number, np.float32), top_chunk=number)


def numbered(numbers):
    return {fingerprint(number): score(number) for number in numbers}


def plain(scores):
    """Scores as what can be compared: the bits of the logits, and the top chunk."""
    return {key: (found.logits_L.tobytes(), found.top_chunk) for key, found in scores.items()}


@pytest.fixture
def no_runs(monkeypatch):
    """No run has a store yet, and those of the test go with it."""
    monkeypatch.setattr(score_store, "_stores", {})


# any 32 bits are a float32: infinities, every kind of NaN, -0.0 and the smallest numbers among them
bits = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=6)
entries = st.dictionaries(
    st.binary(min_size=32, max_size=32).map(bytes.hex), st.tuples(bits, st.integers(0, 2**31)), max_size=30
)


@settings(deadline=None)
@given(entries=entries, puts=st.integers(1, 4), data=st.data())
def test_what_is_put_comes_back_bit_for_bit(entries, puts, data):
    scores = {
        key: StoredScore(logits_L=np.array(logits, np.uint32).view(np.float32), top_chunk=top_chunk)
        for key, (logits, top_chunk) in entries.items()
    }
    store, keys = ScoreStore(), sorted(scores)
    for part in range(puts):
        store.put({key: scores[key] for key in keys[part::puts]})

    wanted = data.draw(st.lists(st.sampled_from([*keys, "00" * 32, "ff" * 32]), max_size=60))
    found = store.get(wanted)

    assert plain(found) == plain({key: scores[key] for key in wanted if key in scores})
    assert all(each.logits_L.dtype == np.float32 for each in found.values())


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf, -0.0, np.finfo(np.float32).smallest_subnormal])
def test_special_numbers_come_back(special):
    store, logits = ScoreStore(), np.array([special, 1.5], np.float32)

    store.put({fingerprint(1): StoredScore(logits_L=logits, top_chunk=0)})

    assert store.get([fingerprint(1)])[fingerprint(1)].logits_L.tobytes() == logits.tobytes()


def test_a_row_of_a_larger_array_comes_back():
    logits_DL = np.arange(12, dtype=np.float32).reshape(3, 4)
    store = ScoreStore()

    store.put({fingerprint(1): StoredScore(logits_L=logits_DL[:, 2], top_chunk=7)})

    np.testing.assert_array_equal(store.get([fingerprint(1)])[fingerprint(1)].logits_L, [2, 6, 10])


@pytest.mark.parametrize("num_keys", [0, 1, MOST_PARAMETERS - 1, MOST_PARAMETERS, MOST_PARAMETERS + 1, 2345])
def test_any_number_of_keys_may_be_asked_for_at_once(num_keys):
    store, known = ScoreStore(), [number for number in range(num_keys) if number % 7]
    store.put(numbered(known))

    found = store.get([fingerprint(number) for number in range(num_keys)])

    assert plain(found) == plain(numbered(known))


def test_more_keys_than_a_query_takes_may_be_equal():
    store = ScoreStore()
    store.put(numbered([3]))

    assert plain(store.get([fingerprint(3), fingerprint(4)] * 700)) == plain(numbered([3]))


def test_unknown_keys_are_absent():
    store = ScoreStore()

    assert store.get([fingerprint(1), fingerprint(2)]) == {}
    store.put(numbered([1]))
    assert list(store.get([fingerprint(1), fingerprint(2)])) == [fingerprint(1)]


def test_what_was_put_first_stays():
    store = ScoreStore()
    store.put({fingerprint(1): score(10)})

    store.put({fingerprint(1): score(20), fingerprint(2): score(30)})

    assert plain(store.get([fingerprint(1), fingerprint(2)])) == plain(
        {fingerprint(1): score(10), fingerprint(2): score(30)}
    )


def test_nothing_may_be_put():
    store = ScoreStore()

    store.put({})
    store.put(numbered([1]))

    assert plain(store.get([fingerprint(1)])) == plain(numbered([1]))


class Interrupting:
    def tobytes(self):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (StoredScore(logits_L=Interrupting(), top_chunk=0), KeyboardInterrupt),
        (StoredScore(logits_L=np.zeros(3, np.float32), top_chunk=2**63), OverflowError),  # more than SQLite stores
    ],
    ids=["interrupted", "refused"],
)
def test_a_put_that_fails_leaves_a_store_that_can_be_used(bad, error):
    store = ScoreStore()
    store.put(numbered([1]))
    with pytest.raises(error):
        store.put({**numbered([2]), fingerprint(4): bad})

    store.put(numbered([2, 3]))

    found = plain(store.get([fingerprint(number) for number in range(5)]))
    assert found.items() <= plain(numbered([1, 2, 3])).items()  # it may forget, not invent
    assert {fingerprint(2), fingerprint(3)} <= found.keys()


# runs


@pytest.mark.usefixtures("no_runs")
def test_a_run_has_one_store_and_another_run_an_empty_one():
    first = score_store.of_run("/out/runs/a")
    first.put(numbered([1]))

    assert score_store.of_run("/out/runs/a") is first
    second = score_store.of_run("/out/runs/b")
    assert second is not first
    assert second.get([fingerprint(1)]) == {}
    assert score_store.of_run("/out/runs/a").get([fingerprint(1)]) == {}  # only one run's scores are kept


@pytest.mark.usefixtures("no_runs")
def test_who_holds_the_store_of_a_run_that_was_dropped_may_go_on():
    first = score_store.of_run("/out/runs/a")
    score_store.of_run("/out/runs/b")

    first.put(numbered([1]))

    assert plain(first.get([fingerprint(1)])) == plain(numbered([1]))


@pytest.mark.usefixtures("no_runs")
def test_threads_that_ask_for_a_run_at_once_get_one_store():
    barrier = threading.Barrier(8)

    def ask(_):
        barrier.wait(PATIENCE_S)
        return score_store.of_run("/out/runs/a")

    with ThreadPoolExecutor(8) as pool:
        stores = list(pool.map(ask, range(8)))

    assert len({id(store) for store in stores}) == 1


@pytest.mark.usefixtures("no_runs")
def test_a_store_that_nobody_needs_any_more_closes_its_database(monkeypatch):
    closed = []

    class Connection(sqlite3.Connection):
        def close(self):
            closed.append("closed")
            super().close()

    connect = sqlite3.connect
    monkeypatch.setattr(
        score_store.sqlite3, "connect", lambda *path, **options: connect(*path, factory=Connection, **options)
    )
    score_store.of_run("/out/runs/a").put(numbered([1]))
    assert closed == []

    score_store.of_run("/out/runs/b")
    gc.collect()

    assert closed == ["closed"]  # from Python 3.13 on, one that is only forgotten is a warning


def test_several_threads_may_use_one_store():
    store, barrier = ScoreStore(), threading.Barrier(4)

    def work(thread):
        barrier.wait(PATIENCE_S)
        num_wrong = 0
        for step in range(20):
            own, shared = range(1000 * thread, 1000 * thread + 5 * step + 5), range(10**6 + step, 10**6 + step + 5)
            store.put(numbered([*own[-5:], *shared]))  # every thread puts what is shared
            seen = [*own[-10:], *shared]
            num_wrong += plain(store.get([fingerprint(number) for number in seen])) != plain(numbered(seen))
        return num_wrong

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [0] * 4

    everything = [*range(10**6, 10**6 + 24), *(1000 * thread + i for thread in range(4) for i in range(100))]
    assert plain(store.get([fingerprint(number) for number in everything])) == plain(numbered(everything))


# memory and disk, each in a process of its own

GROW = """
import sys
import numpy as np
import psutil
from belt_tasks.score_store import ScoreStore, StoredScore

num_blocks, num_labels = int(sys.argv[1]), int(sys.argv[2])
store, rng, process = ScoreStore(), np.random.default_rng(0), psutil.Process()
before, growth, some = process.memory_info().rss, 0, {}
for block in range(num_blocks):
    keys = [row.tobytes().hex() for row in rng.integers(0, 256, (1000, 32), dtype=np.uint8)]
    logits = np.full((1000, num_labels), block, np.float32)
    store.put({key: StoredScore(logits_L=row, top_chunk=block) for key, row in zip(keys, logits)})
    growth = max(growth, process.memory_info().rss - before)
    some[keys[0]] = block
found = store.get(list(some))
assert {key: (score.logits_L.tolist(), score.top_chunk) for key, score in found.items()} == {
    key: ([float(block)] * num_labels, block) for key, block in some.items()
}
print(growth, flush=True)
"""

# how large those files are that have no name any more; then until it is killed
WAIT = """
import os
from contextlib import suppress

nameless_bytes = 0
for number in range(3, 200):
    with suppress(OSError):
        file = os.fstat(number)
        nameless_bytes += file.st_size * (file.st_nlink == 0)
print(nameless_bytes, flush=True)
input()
"""


def python(folder, code, *arguments):
    """A process whose temporary files are in a folder."""
    environment = {**os.environ, "TMPDIR": str(folder), "SQLITE_TMPDIR": str(folder)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_memory_stays_flat_and_no_file_is_left(tmp_path):
    num_blocks, num_labels = 300, 50  # 300,000 scores: 72 MB of keys and logits alone

    said, _ = python(tmp_path, GROW, num_blocks, num_labels).communicate()

    assert 0 < int(said) < 45e6
    assert list(tmp_path.iterdir()) == []


def test_no_file_is_left_by_a_process_that_is_killed(tmp_path):
    with python(tmp_path, GROW + WAIT, 40, 200) as process:
        assert int(process.stdout.readline()) > 0
        nameless_bytes = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)

    assert process.returncode == -signal.SIGKILL
    assert nameless_bytes > 10e6  # there was a file to leave behind
    assert list(tmp_path.iterdir()) == []
