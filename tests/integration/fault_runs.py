"""Scoring runs that are disturbed: processes to kill, the nights that they run in, and what readers may see of them."""

import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import polars as pl
from deltalake import DeltaTable
from polars.testing import assert_frame_equal

from belt_tasks import object_stores, score_tables, storage
from tests.delta_readers import by_delta_lake
from tests.integration import fault_child
from tests.integration.fault_proxy import WRITES, Proxy, Request, fault_proxy
from tests.s3_server import S3Server

TABLES = ("predictions", "evidence", "rejected", "runs")
COLUMNS_OF_RUNS = ["run_id", "base_run_id", "num_documents", "num_rejected", "num_new", "num_changed", "num_removed"]
AT_ONCE = 2  # rounds, each with a process of its own
LONGEST_S = 60

_one_thread = threading.Lock()  # multiprocessing looks after its processes from one thread at a time
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([fault_child.__name__])


def stop_server_of_forks() -> None:
    """It would otherwise stay as long as this process."""
    multiprocessing.forkserver._forkserver._stop()


class Child:
    """A process that scores, started."""

    def __init__(
        self, arguments: tuple[str, str, str], spec: Mapping[str, Any], environment: Mapping[str, str], **more: Any
    ) -> None:
        self._told, tells = _processes.Pipe(duplex=False)
        self._process = _processes.Process(
            target=fault_child.run, args=(arguments, spec, environment, tells), kwargs=more, daemon=True
        )
        with _one_thread:
            self._process.start()
        tells.close()

    def kill(self) -> None:
        """As `kill -9` does."""
        self._process.kill()

    def ends_within(self, seconds: float) -> bool:
        """Whether it has ended by then."""
        if not multiprocessing.connection.wait([self._process.sentinel], seconds):
            return False
        with _one_thread:
            self._process.join()
        return True

    def outcome(self) -> tuple[str, str]:
        """("done", run id), or an error's class and message, or ("killed", ""); waits for it."""
        assert self.ends_within(LONGEST_S), f"it does not end within {LONGEST_S} s"
        code = self._process.exitcode
        assert code in (0, -signal.SIGKILL), "it ended with an error that is none of belt's; see its output"
        return self._told.recv() if self._told.poll() and code == 0 else ("killed", "")


Disturbance = Callable[[Request, Child], bytes | None]
"""What becomes of a run's request, and of the run."""


def let_pass(request: Request, _: Child) -> bytes:
    """Nothing."""
    return request.forward()


@dataclass(kw_only=True)
class Night:
    """A run to be disturbed: what it is told, and the output that it starts from."""

    server: S3Server
    root: str
    corpus: str
    model: str
    spec: dict[str, Any]
    base: str | None
    """An output as it is before; None is an empty one."""

    def output(self, name: str) -> str:
        """A new output, as it is before the run."""
        uri = f"{self.root}/{name}"
        if self.base is not None:
            copy(self.base, uri)
        return uri

    def start(self, output: str, *, endpoint: str | None = None, **more: Any) -> Child:
        """Start a run, by a proxy perhaps."""
        environment = self.server.environment() | ({} if endpoint is None else {"AWS_ENDPOINT_URL": endpoint})
        spec = self.spec | more.pop("spec", {})
        return Child((self.corpus, self.model, output), spec, environment, **more)

    def run(self, output: str, **more: Any) -> tuple[str, str]:
        """A run to its end."""
        return self.start(output, **more).outcome()

    @contextmanager
    def proxied(self, output: str, disturb: Disturbance = let_pass, **more: Any) -> Iterator[tuple[Child, Proxy]]:
        """A run whose every request goes by a proxy."""
        started: Future[Child] = Future()
        with fault_proxy(self.server.endpoint, lambda request: disturb(request, started.result())) as proxy:
            child = self.start(output, endpoint=proxy.endpoint, **more)
            started.set_result(child)
            try:
                yield child, proxy
            finally:
                child.kill()
                child.ends_within(LONGEST_S)

    @cached_property
    def undisturbed(self) -> "Published":
        """What a run that nothing disturbs does, and what readers see meanwhile and afterwards."""
        output = self.output("undisturbed")
        with self.proxied(output) as (child, proxy):
            assert child.outcome()[0] == "done"
        return Published(
            output=output,
            num_writes=sum(method in WRITES for method, _ in proxy.requests),
            num_requests=len(proxy.requests),
            versions={name: read_versions(output, name) for name in TABLES},
        )

    def check_what_readers_see(self, output: str, *, done: bool = False) -> None:
        """Whatever happened so far, each table is as an undisturbed run has it at that version, or did when `done`."""
        versions = {name: version_of(output, name) for name in TABLES}
        for name, version in versions.items():
            expected = self.undisturbed.versions[name]
            if done:
                assert version == len(expected) - 1
            if version is not None:
                assert_same(read(output, name, version), expected[version])
        numbers = [-1 if versions[name] is None else versions[name] for name in ("predictions", "runs", "rejected")]
        assert numbers == sorted(numbers, reverse=True)  # the commit to predictions is the one that counts
        assert numbers[0] - numbers[-1] <= 1

    def finish(self, output: str) -> None:
        """Run again, to the end: finished shards stay as they are, and the tables are those of an undisturbed run."""
        self.check_what_readers_see(output)
        before = finished_objects(output)

        assert self.run(output)[0] == "done"

        now = entity_tags(output)
        assert {path: now[path] for path in before} == before
        self.check_what_readers_see(output, done=True)


@dataclass(frozen=True, kw_only=True)
class Published:
    """What an undisturbed run leaves."""

    output: str
    num_writes: int
    num_requests: int
    versions: dict[str, dict[int, pl.DataFrame]]
    """Of each table."""

    @property
    def predictions(self) -> pl.DataFrame:
        """At the end."""
        return max(self.versions["predictions"].items())[1]


def read_versions(output: str, name: str) -> dict[int, pl.DataFrame]:
    """All versions of a published table, as others read them."""
    last = version_of(output, name)
    return {version: read(output, name, version) for version in range(0 if last is None else last + 1)}


def version_of(output: str, name: str) -> int | None:
    """The present version of a published table; None where there is none."""
    table = score_tables.table_at(output, name).load()
    return None if table is None else table.version()


def read(output: str, name: str, version: int | None = None) -> pl.DataFrame:
    """What two runs of the same have in common of a published table, as others read it."""
    table = score_tables.table_at(output, name)
    return comparable(by_delta_lake(table.uri, version), name)


def comparable(rows: pl.DataFrame, name: str) -> pl.DataFrame:
    """Without what differs between two runs of the same."""
    rows = rows.sort(*score_tables.SORTED_BY[name])
    return rows.select(COLUMNS_OF_RUNS) if name == "runs" else rows.drop("scored_at", strict=False)


def assert_same(rows: pl.DataFrame, expected: pl.DataFrame) -> None:
    """Row for row, but for float noise."""
    assert_frame_equal(rows, expected, abs_tol=1e-6)


def copy(output: str, to: str) -> None:
    """All objects of an output."""
    filesystem, source, target = _filesystem(), *(uri.removeprefix("s3://") for uri in (output, to))
    with ThreadPoolExecutor() as threads:
        paths = filesystem.find(source)
        list(threads.map(lambda path: filesystem.cp_file(path, target + path.removeprefix(source)), paths))


def entity_tags(output: str) -> dict[str, str]:
    """Of all objects of an output, by path beneath it."""
    root = output.removeprefix("s3://")
    found = _filesystem().find(root, detail=True)
    return {path.removeprefix(f"{root}/"): info["e_tag"] for path, info in found.items()}


def finished_objects(output: str) -> dict[str, str]:
    """Entity tags of what finished shards wrote, and of their receipts."""
    tags = entity_tags(output)
    done = {path for path in tags if "/receipts/" in path}
    for receipt in list(done):
        run, _, shard = receipt.removesuffix(".json").partition("/receipts/")
        done |= {f"{run}/{table}/{shard}.parquet" for table in ("predictions", "rejected")}
    return {path: tags[path] for path in done}


def orphans(output: str) -> set[str]:
    """Objects in the folder of predictions that no version refers to."""
    uri = score_tables.table_at(output, "predictions").uri
    there = {path for path in entity_tags(uri) if not path.startswith("_delta_log/")}
    table = score_tables.table_at(output, "predictions").load()
    for version in range(0 if table is None else table.version() + 1):
        at = DeltaTable(uri, version=version, storage_options=storage.delta_options(uri))
        there -= {path.rpartition("/")[2] for path in at.file_uris()}
    return there


def in_parallel(rounds: Callable[[int], None], numbers: Iterable[int]) -> None:
    """Call a round with each number, some at once; raises what the first of them to fail raises."""
    with ThreadPoolExecutor(AT_ONCE) as threads:
        for done in [threads.submit(rounds, number) for number in numbers]:
            done.result()


def _filesystem() -> Any:
    return object_stores.filesystem("s3")
