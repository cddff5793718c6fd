"""Faults, on a real S3 server: runs that are killed, cut off, throttled, raced and starved of disk, at every moment.

The law: run again, and the published tables are, row for row, those of a run that nothing disturbed; finished shards
are reused; and at no moment does a reader see a mixture. A proxy before the server sees each request of a run, so that
"every moment" is every state that the store can be in: there is one between any two writes.

BELT_FAULT_ROUNDS is the number of rounds of the tests that choose their faults by chance; with 20 or more, a rescoring
is killed after each of its writes, not every other one.
"""

import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from belt_tasks import checkpoint, object_stores, run_list, storage
from belt_tasks.score_corpus import score_corpus
from tests.delta_readers import by_delta_lake, by_polars
from tests.integration.fault_child import score_spec
from tests.integration.fault_proxy import Last, Request, refusal
from tests.integration.fault_runs import (
    LONGEST_S,
    TABLES,
    Child,
    Disturbance,
    Night,
    assert_same,
    comparable,
    in_parallel,
    let_pass,
    orphans,
    read,
    stop_server_of_forks,
    version_of,
)
from tests.integration.test_nasty_corpus import write_nasty
from tests.s3_server import BUCKET, S3Server

ROUNDS = int(os.environ.get("BELT_FAULT_ROUNDS", "4"))
MANY_ROUNDS = 20
pytestmark = pytest.mark.timeout(120 + 45 * ROUNDS)
TEXT = "the quick brown fox jumps over the lazy dog and then it sleeps "


@pytest.fixture(scope="module")
def store(s3_server) -> Iterator[S3Server]:
    """The server, which belt finds by the environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment().items():
            patch.setenv(name, value)
        object_stores.configure({})
        yield s3_server
    object_stores.configure({})
    stop_server_of_forks()


@pytest.fixture(scope="module")
def model(store, tiny_checkpoint) -> str:  # noqa: ARG001 - finds the server by the environment
    """The tiny checkpoint on the server."""
    folder, uri = Path(checkpoint.resolve(tiny_checkpoint)), f"s3://{BUCKET}/faults/model"
    storage.put_directory(folder, uri, last="card.json")
    return uri


def put_file(corpus: str, name: str, ids: list[str], *, edition: int = 0) -> None:
    """A file of a corpus; its second document has no text, and texts differ by edition."""
    texts = [f"{doc_id} {edition} {TEXT * (1 + i % 4)}" if i != 1 else None for i, doc_id in enumerate(ids)]
    storage.write_parquet(f"{corpus}/{name}.parquet", pl.DataFrame({"doc_id": ids, "text": texts}).to_arrow())


def put_first_night(corpus: str) -> None:
    """Three files of five documents; one id of the last is in the first too."""
    for i, name in enumerate("abc"):
        put_file(corpus, name, [f"{name}{j}" for j in range(5)] + ["a0"][: i // 2])


def put_second_night(corpus: str) -> None:
    """One file is as it was, one changed, one is gone and one new."""
    put_file(corpus, "b", ["b0", "b1", "b2", "b5", "b6"], edition=1)
    object_stores.filesystem("s3").rm_file(f"{corpus}/c.parquet")
    put_file(corpus, "d", ["d0", "d1", "d2", "c0"])


@pytest.fixture(scope="module")
def nights(store, model) -> dict[str, Night]:
    """A first run, a second night, and a rescoring that is published as it goes."""
    root = f"s3://{BUCKET}/faults"
    made = {}
    for name in ("first", "second"):
        put_first_night(f"{root}/{name}/corpus")
        made[name] = Night(
            server=store, root=f"{root}/{name}", corpus=f"{root}/{name}/corpus", model=model, spec={}, base=None
        )
    base = made["second"].undisturbed.output
    put_second_night(made["second"].corpus)
    made["second"] = Night(
        server=store, root=f"{root}/second-night", corpus=made["second"].corpus, model=model, spec={}, base=base
    )
    made["rescoring"] = Night(
        server=store,
        root=f"{root}/rescoring",
        corpus=made["first"].corpus,
        model=model,
        spec={"size": 20, "publish_every": 6},
        base=made["first"].undisturbed.output,
    )
    return made


NIGHTS = ["first", "second", "rescoring"]


@pytest.mark.parametrize("name", NIGHTS)
def test_kill_9_between_any_two_writes(nights, name):
    night = nights[name]
    num_orphans = []

    def killed_after(number: int) -> None:
        output, numbers = night.output(f"killed-{number}"), count(1)

        def kill(request: Request, child: Child) -> bytes | None:
            if request.is_write and next(numbers) == number:
                request.forward()
                child.kill()
                return None
            return request.forward()

        with night.proxied(output, kill) as (child, _):
            assert child.outcome() == ("killed", "")
        num_orphans.append(len(orphans(output)))
        night.finish(output)

    step = 1 if ROUNDS >= MANY_ROUNDS or name != "rescoring" else 2  # it takes the longest
    in_parallel(killed_after, range(1, night.undisturbed.num_writes + 1, step))

    assert sum(num_orphans) > 0  # some were killed between a table's file and its commit, and no reader saw it


def test_kill_9_at_any_moment(nights):
    def killed_at_random(number: int) -> None:
        chance, night = np.random.default_rng(number), nights[NIGHTS[number % 3]]
        output = night.output(f"killed-at-random-{number}")
        for _ in range(chance.integers(1, 4)):
            child = night.start(output)
            if child.ends_within(chance.uniform(0, 1.5)):
                break
            child.kill()
            child.outcome()
            night.check_what_readers_see(output)
        night.finish(output)

    in_parallel(killed_at_random, range(4 * ROUNDS))


class Meeting:
    """Lets two requests for the same object go on together, so that the server has both at once."""

    def __init__(self, *paths: str) -> None:
        self._barriers = {path: threading.Barrier(2) for path in paths}

    def __call__(self, request: Request, _: Child) -> bytes:
        barrier = next((self._barriers[path] for path in self._barriers if path in request.path), None)
        if request.is_write and barrier is not None:
            with suppress(threading.BrokenBarrierError):  # the other does not come
                barrier.wait(3)
        return request.forward()


def start_both(night: Night, output: str, specs: list[dict], disturb, delay_s: float) -> list[tuple[str, str]]:
    """Two runs at once; returns how each ends."""
    with ExitStack() as stack:
        children = []
        for spec in specs:
            children.append(stack.enter_context(night.proxied(output, disturb, spec=spec))[0])
            time.sleep(delay_s)
        return [child.outcome() for child in children]


def rows_of(output: str) -> pl.DataFrame:
    """Predictions without the run that made them."""
    return read(output, "predictions").drop("run_id")


@pytest.mark.parametrize("name", ["first", "second"])
def test_of_two_runs_by_different_rules_at_once_one_is_shown_and_the_other_told(nights, name):
    night, specs = nights[name], [{"size": 30}, {"size": 20}]
    of_other = replace(night, root=f"{night.root}/other", spec={"size": 20}).undisturbed.predictions
    expected = [rows.drop("run_id") for rows in (night.undisturbed.predictions, of_other)]
    rejected = read(night.undisturbed.output, "rejected").drop("run_id")
    ends = []

    def race(number: int) -> None:
        chance, output = np.random.default_rng(number), night.output(f"raced-{number}")
        version = version_of(output, "predictions")
        commit = f"/predictions/_delta_log/{0 if version is None else version + 1:020}.json"

        if number % 2:
            told = start_both(night, output, specs, Meeting(commit), 0)
        else:
            told = start_both(night, output, specs, let_pass, chance.uniform(0, 0.6))

        won = [i for i, (word, _) in enumerate(told) if word == "done"]
        ends.append(len(won))
        for word, message in told:
            assert word in ("done", "ConflictError"), message
        assert won
        shown = rows_of(output)
        (i,) = [i for i in won if expected[i]["scoring_fingerprint"][0] == shown["scoring_fingerprint"][0]]
        assert_same(shown, expected[i])
        for i in (chance.integers(2), 0, 1):
            assert night.run(output, spec=specs[i])[0] == "done"
            assert_same(rows_of(output), expected[i])
        assert_same(read(output, "rejected").drop("run_id"), rejected)
        known = read(output, "runs")
        assert known["run_id"].is_unique().all()
        assert known["base_run_id"].is_unique().all()  # no two are a change of the same state
        assert set(known["run_id"]) >= {told[i][1] for i in won} | set(read(output, "predictions")["run_id"])

    in_parallel(race, range(ROUNDS))

    assert 1 in ends


def test_of_two_identical_runs_at_once_one_is_shown_and_the_other_finds_it(nights):
    def race(number: int) -> None:
        chance, night = np.random.default_rng(number), nights[NIGHTS[number % 3]]
        output = night.output(f"doubled-{number}")
        commits = [f"/{table}/_delta_log/{version:020}.json" for table in TABLES for version in range(4)]

        if number % 2:
            told = start_both(night, output, [{}, {}], Meeting(*commits), 0)
        else:
            told = start_both(night, output, [{}, {}], let_pass, chance.uniform(0, 0.6))

        words = {word for word, _ in told}
        # at worst, a file is replaced while it is read, or a step of several is made by the other
        assert words <= {"done", "TransientError", "ConflictError"}, told
        night.finish(output)

    in_parallel(race, range(ROUNDS))


@pytest.mark.parametrize("name", NIGHTS)
def test_a_commit_whose_answer_is_lost_is_found_to_be_made(nights, name):
    night, lost = nights[name], []
    output = night.output("lost-answers")

    def lose(request: Request, _: Child) -> bytes | None:
        answer = request.forward()
        if request.is_write and "/_delta_log/" in request.path and request.path not in lost:
            lost.append(request.path)
            return None
        return answer

    with night.proxied(output, lose) as (child, _):
        assert child.outcome()[0] == "done"

    num_before = 0 if night.base is None else 1
    assert len(lost) == sum(len(versions) - num_before for versions in night.undisturbed.versions.values())
    night.check_what_readers_see(output, done=True)


@pytest.mark.parametrize("num_commits", [1, 2])
def test_a_run_killed_between_two_commits_is_completed_by_another(nights, num_commits):
    night, commits = nights["second"], count(1)
    output = night.output(f"completed-{num_commits}")

    def kill(request: Request, child: Child) -> bytes | None:
        answer = request.forward()
        if request.is_write and "/_delta_log/" in request.path and next(commits) == num_commits:
            return child.kill()
        return answer

    with night.proxied(output, kill) as (child, _):
        assert child.outcome() == ("killed", "")
    assert night.run(output, spec={"size": 20})[0] == "done"

    expected = night.undisturbed.versions["runs"][1]
    found = read(output, "runs")
    assert_same(found.filter(pl.col("run_id").is_in(expected["run_id"].to_list())), expected)
    assert len(found) == len(expected) + 1


def out_of_order(chance: np.random.Generator, share: float) -> Disturbance:
    """A share of requests is refused, or loses its connection before, while or after it is done."""

    def disturb(request: Request, _: Child) -> bytes | None:
        if chance.uniform() > share:
            return request.forward()
        match chance.integers(5):
            case 0:
                return refusal(503)
            case 1:
                return refusal(500)
            case 2:
                request.forward_half()
                return None
            case 3:
                request.forward()
                return None
            case _:
                answer = request.forward()
                return Last(answer[: int(chance.integers(len(answer)))])

    return disturb


def test_a_store_that_is_out_of_order_is_endured(nights):
    def disturbed(number: int) -> None:
        chance, night = np.random.default_rng(number), nights[NIGHTS[number % 3]]
        output = night.output(f"disturbed-{number}")

        with night.proxied(output, out_of_order(chance, share=0.05)) as (child, proxy):
            word, message = child.outcome()

        assert word in ("done", "TransientError"), message
        assert len(proxy.requests) > 50 or word == "TransientError"
        night.finish(output)

    in_parallel(disturbed, range(ROUNDS))


def test_a_listing_of_a_log_that_is_cut_off_is_worth_another_attempt(nights):
    night = nights["second"]

    def disturbed(number: int, chosen: float) -> int:
        """Cut off the answer to one of the requests that list the log of a table; returns how many there were."""
        output, numbers = night.output(f"cut-off-{number}"), count()

        def cut(request: Request, _: Child) -> bytes | None:
            answer = request.forward()
            lists = "list-type" in request.path and "_delta_log" in request.path
            return Last(answer[:-20]) if lists and next(numbers) == chosen else answer

        with night.proxied(output, cut) as (child, _):
            word, message = child.outcome()
        assert word in ("done", "TransientError"), message
        night.finish(output)
        return next(numbers)

    most = disturbed(0, math.inf)
    assert most > 10
    step = 1 if ROUNDS >= MANY_ROUNDS else 3
    in_parallel(lambda i: disturbed(1 + i, i), range(0, most, step))


def test_a_store_that_is_away_for_two_seconds_is_waited_for(nights):
    def disturbed(number: int) -> None:
        chance, night = np.random.default_rng(number), nights[NIGHTS[number % 3]]
        output, gone = night.output(f"away-{number}"), threading.Event()
        numbers, last = count(), int(chance.integers(night.undisturbed.num_requests))

        def vanish(request: Request, _: Child) -> bytes | None:
            if next(numbers) == last:
                gone.set()
                return None
            return request.forward()

        with night.proxied(output, vanish) as (child, proxy):
            assert gone.wait(LONGEST_S)
            proxy.go_away()
            time.sleep(2)
            proxy.come_back()
            word, message = child.outcome()

        assert word in ("done", "TransientError"), message
        night.finish(output)

    in_parallel(disturbed, range(ROUNDS // 2))


def by_duckdb(uri: str) -> pl.DataFrame:
    """Without its extension for Delta, which it would download: it scans what the table's log names."""
    rows = DeltaTable(uri, storage_options=storage.delta_options(uri)).to_pyarrow_dataset()
    with duckdb.connect() as connection:
        return pl.DataFrame(connection.register("predictions", rows).sql("FROM predictions").to_arrow_table())


def test_readers_never_see_a_mixture_while_runs_are_killed(nights):
    """Each reads the present version again and again, while a rescoring that is published as it goes is killed."""
    night, done, chance = nights["rescoring"], threading.Event(), np.random.default_rng(0)
    output = night.output("watched")
    expected = list(night.undisturbed.versions["predictions"].values())

    def watch(read: Callable[[str], pl.DataFrame]) -> list[int]:
        """Which version each look showed."""
        seen = []
        while not done.is_set() or not seen or seen[-1] < len(expected) - 1:
            rows = comparable(read(f"{output}/tables/predictions"), "predictions")
            (version,) = [i for i, state in enumerate(expected) if state["run_id"].equals(rows["run_id"])]
            assert_same(rows.cast(expected[version].schema), expected[version])
            seen.append(version)
        return seen

    with ThreadPoolExecutor(3) as threads:
        watching = [threads.submit(watch, reader) for reader in (by_polars, by_delta_lake, by_duckdb)]
        try:
            for _ in range(3):
                child = night.start(output)
                if not child.ends_within(chance.uniform(0.5, 1.5)):
                    child.kill()
                    child.outcome()
            night.finish(output)
        finally:
            done.set()
        for each in watching:
            seen = each.result()
            assert seen == sorted(seen)
            assert seen[0] == 0
            assert len(seen) > 5


@pytest.mark.parametrize(
    ("most_bytes", "words"),
    [
        (150_000, r"write s3://.*/inventory/[0-9a-f]*\.parquet, by a temporary file in"),
        (250_000, "write a temporary file in"),  # predictions, not sorted yet
    ],
)
def test_a_full_disk_for_temporary_files_is_one_clear_error(nights, most_bytes, words):
    night = wide(nights["first"])

    check_that_a_full_disk_is_told(night, night.output(f"full-{most_bytes}"), most_bytes, words)


def test_a_full_disk_for_the_output_is_one_clear_error(nights, tiny_checkpoint, tmp_path):
    night, output = replace(wide(nights["first"]), model=tiny_checkpoint), str(tmp_path / "out")

    check_that_a_full_disk_is_told(night, output, 150_000, rf"write {output}/inventory/[0-9a-f]*\.parquet")


def wide(night: Night) -> Night:
    """With a corpus whose tables are larger than the checkpoint."""
    corpus = f"{night.root}/wide"
    ids = pl.Series([os.urandom(32).hex() for _ in range(3000)])
    storage.write_parquet(f"{corpus}/a.parquet", pl.DataFrame({"doc_id": ids, "text": ids}).to_arrow())
    return replace(night, corpus=corpus)


def check_that_a_full_disk_is_told(night: Night, output: str, most_bytes: int, words: str) -> None:
    word, message = night.run(output, most_file_bytes=most_bytes)

    assert word == "ConfigError", message
    assert re.search(rf"^cannot {words}.*: File too large$", message), message
    assert version_of(output, "predictions") is None
    assert night.run(output)[0] == "done"
    assert len(read(output, "predictions")) == 3000


@pytest.mark.parametrize("name", NIGHTS)
def test_a_clock_that_is_wrong_changes_nothing_but_times(nights, name):
    night = nights[name]
    output = night.output("late")

    word, run_id = night.run(output, clock_behind_s=3600)

    assert word == "done"
    night.check_what_readers_see(output, done=True)
    listed = run_list.list_runs(output)
    assert [run.run_id for run in listed if run.state == "shown"] == [run_id]
    assert {run.run_id for run in listed} == set(read(output, "runs")["run_id"])


def test_a_nasty_corpus_that_is_killed_and_goes_on_gives_what_local_files_give(nights, tiny_checkpoint, tmp_path):
    expected = write_nasty(tmp_path / "corpus", kind=pa.binary())
    corpus = f"{nights['first'].root}/nasty"
    storage.put_directory(tmp_path / "corpus", corpus, last="")
    night = replace(nights["first"], corpus=corpus)
    output = night.output("nasty-out")

    for num_writes in (12, 9):
        numbers = count(1)

        def kill(request: Request, child: Child, numbers=numbers, num_writes=num_writes) -> bytes | None:
            answer = request.forward()
            if not request.is_write or next(numbers) < num_writes:
                return answer
            return child.kill()

        with night.proxied(output, kill) as (child, _):
            assert child.outcome() == ("killed", "")
        assert version_of(output, "predictions") is None
    assert night.run(output)[0] == "done"

    near = str(tmp_path / "out")
    score_corpus(str(tmp_path / "corpus"), tiny_checkpoint, near, spec=score_spec())
    assert_same(*(rows_of(each) for each in (output, near)))
    rejected = read(output, "rejected").select("source_uri", "row_index", "reason").rows()
    bad = {(uri.replace(str(tmp_path / "corpus"), corpus), i): why for (uri, i), (_, why) in expected.items() if why}
    assert {(uri, i): reason for uri, i, reason in rejected} == bad
    assert len(rejected) == len(bad)
