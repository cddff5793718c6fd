"""Workers on a Ray cluster: processes that do stages while the flow, and all that Prefect knows of it, stay here.

A worker is an actor that lives as long as the pool: it loads its checkpoint once, has the cores and the share of a GPU
that were asked for, and tokenizes ahead of its own encoder (see `shard_scoring`), so that texts never travel. What
goes there is a reference and specs, what comes back is a receipt. A thread of the flow waits for each worker, relays
its progress and its log, and ends it when the flow is stopped or its time is over. A worker that dies costs a retry.
"""

import logging
import os
import queue
import secrets
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar

import joblib

from belt_tasks import object_stores, progress, telemetry
from belt_tasks.errors import ConfigError, DeadlineError, TransientError
from belt_tasks.progress import StoppedError
from belt_tasks.remote_worker import Raised, RemoteWorker, Report
from belt_tasks.specs import RaySpec

Handle = Any
"""Of an actor, or of what a call will return: Ray's types say less than they promise."""
P = ParamSpec("P")
R = TypeVar("R")

POLL_S = 0.5
CONNECT_S = 10.0
MOST_CONNECTS = 3
STOP_S = 5.0  # a stage that is asked to end does so after its present mini-batch
OBJECT_STORE_BYTES = 80 * 2**20  # about the least that Ray takes: what travels is small
NUM_THREADS = 3  # of a worker: one that works, and those that are asked for a report or told to stop


@dataclass(frozen=True, kw_only=True)
class _Worker:
    """A process, and what it answers once it is ready for calls."""

    actor: Handle
    answer: "Future[tuple[str, int]]"


class RayWorkers:
    """A pool of workers, to be used by as many threads."""

    def __init__(self, spec: RaySpec) -> None:
        self._spec = spec
        self._lock = threading.Lock()
        self._free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        """Those that have answered and are not busy."""
        self._num_answered = 0
        self._none_since = time.monotonic()
        self.num_workers = spec.num_workers or _room(spec)
        for _ in range(self.num_workers):
            self._start_one()

    def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a stage in the next worker that is free.

        Raises:
            ConfigError: no worker started in time, or belt is another there.
            TransientError: the worker was lost.
            Exception: what the stage raises, and what `progress.check` does.
        """
        import ray  # noqa: PLC0415 - optional, and takes a second

        name = function.__name__
        worker = self._take(name)
        done: Handle = worker.actor.call.remote(function, args, kwargs)
        try:
            _follow(worker.actor, done, name)
            result = _got(done)
        except ray.exceptions.RayError as error:
            self._replace(worker)
            raise TransientError(f"{name}: its Ray worker was lost ({_reason(error)})") from None
        except (StoppedError, DeadlineError):  # so are all the others
            _end(worker.actor, done)
            raise
        except BaseException:
            _end(worker.actor, done)
            self._replace(worker)
            raise
        self._free.put(worker)
        if isinstance(result, Raised):
            raise result.error
        return result  # type: ignore[no-any-return]

    def _start_one(self) -> None:
        import ray  # noqa: PLC0415 - optional, and takes a second

        spec = self._spec
        actors: Handle = ray.remote(RemoteWorker).options(
            num_cpus=spec.num_cpus, num_gpus=spec.num_gpus, max_concurrency=NUM_THREADS, max_restarts=0
        )
        actor = actors.remote(num_cores=spec.num_cpus, share_of_gpu=spec.num_gpus)
        # as a call's argument: those of the constructor are kept by the cluster
        level = logging.getLogger("belt_tasks").getEffectiveLevel()
        answer = actor.start.remote(object_stores.configured(), level).future()
        answer.add_done_callback(lambda _: self._answered(_Worker(actor=actor, answer=answer)))

    def _answered(self, worker: _Worker) -> None:
        with self._lock:
            self._num_answered += 1
        self._free.put(worker)

    def _replace(self, worker: _Worker) -> None:
        import ray  # noqa: PLC0415 - optional, and takes a second

        with self._lock:
            self._num_answered -= 1
            self._none_since = time.monotonic()
        ray.kill(worker.actor)
        self._start_one()

    def _take(self, name: str) -> _Worker:
        """The next worker that is free, with the belt that runs here."""
        while True:
            try:
                worker = self._free.get(timeout=POLL_S)
            except queue.Empty:
                progress.check(name)
                self._check_waiting()
                continue
            error = worker.answer.exception()
            if error is None:
                break
            self._replace(worker)
            raise TransientError(f"{name}: a Ray worker did not start ({_reason(error)})") from None
        there, here = worker.answer.result()[0], version("belt")
        if there != here:
            self._free.put(worker)  # whoever else waits is told the same
            raise ConfigError(f"ray: the cluster's nodes have belt {there} installed, this is belt {here}")
        return worker

    def _check_waiting(self) -> None:
        with self._lock:
            waits = self._num_answered == 0 and time.monotonic() > self._none_since + self._spec.start_timeout_s
        if waits:
            raise ConfigError(
                f"ray: no worker started within start_timeout_s ({self._spec.start_timeout_s:g}); each needs "
                f"num_cpus {self._spec.num_cpus} and num_gpus {self._spec.num_gpus:g} free on one node; {_nodes()}"
            )


@contextmanager
def ray_workers(spec: RaySpec) -> Iterator[Callable[[], RayWorkers]]:
    """A pool that starts when it is first asked for, and ends with the block, as does a private cluster.

    Raises:
        ConfigError: Ray is not installed; asked for, there is no cluster, or no room in it.
    """
    if find_spec("ray") is None:
        raise ConfigError("runner must be 'threads' where Ray is not installed, got 'ray': pip install 'belt[ray]'")
    with ExitStack() as stack:
        started: list[RayWorkers] = []

        def get() -> RayWorkers:
            if not started:
                progress.go_on()  # an earlier run of this process may have been stopped
                stack.enter_context(_cluster(spec))
                started.append(RayWorkers(spec))
            return started[0]

        yield get


@contextmanager
def _cluster(spec: RaySpec) -> Iterator[None]:
    """Within the block this process is connected to a cluster; who was connected before stays so."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told that belt runs
    import ray  # noqa: PLC0415 - optional, and takes a second

    logging.getLogger("ray").setLevel(logging.ERROR)
    if ray.is_initialized():
        yield
        return
    with ExitStack() as stack:
        with _own_signals():
            if spec.address is None:
                stack.enter_context(_private_cluster(spec))
            else:
                _connect(spec.address)
        stack.callback(ray.shutdown)
        yield


def _connect(address: str) -> None:
    import ray  # noqa: PLC0415 - optional, and takes a second

    host, _, port = address.removeprefix("ray://").rpartition(":")
    for attempt in range(MOST_CONNECTS):
        try:
            with socket.create_connection((host, int(port)), timeout=CONNECT_S):  # Ray itself would try for minutes
                pass
            ray.init(address, log_to_driver=False, configure_logging=False, namespace="belt")
        except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            ray.shutdown()
            # on a busy head the process that serves a new client may fail to start, and the next one does
            if isinstance(error, ConnectionAbortedError) and attempt + 1 < MOST_CONNECTS:
                continue
            raise ConfigError(f"ray: cannot connect to a cluster at {address}: {_reason(error)}") from None
        return


@contextmanager
def _private_cluster(spec: RaySpec) -> Iterator[None]:
    """A cluster of this machine alone, which listens to nobody else; it is stopped by `ray.shutdown`."""
    import ray  # noqa: PLC0415 - optional, and takes a second
    from ray._private import ray_constants  # noqa: PLC0415 - optional, and takes a second

    num_cpus = spec.num_workers * spec.num_cpus if spec.num_workers else max(joblib.cpu_count(), spec.num_cpus)
    if not any(name.startswith("RAY_AUTH_") for name in os.environ):
        # of this process alone; Ray would keep one in the home directory
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # where sockets are, so the path must be short
    folder = tempfile.TemporaryDirectory(prefix="belt-ray-", dir="/tmp", ignore_cleanup_errors=True)
    clusters = ray_constants.ENABLE_RAY_CLUSTER
    with folder as path:
        # otherwise Ray takes 127.0.0.1 for the machine's address in its network, and listens there
        ray_constants.ENABLE_RAY_CLUSTER = False
        try:
            ray.init(
                "local",
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                configure_logging=False,
                namespace="belt",
                _temp_dir=path,
            )
        finally:
            ray_constants.ENABLE_RAY_CLUSTER = clusters
        yield


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray takes SIGTERM for itself, which is how Prefect, systemd and containers end a run."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _room(spec: RaySpec) -> int:
    """How many workers the cluster has room for at present."""
    num_workers = 0
    for resources in _resources():
        by_cpu = int(resources.get("CPU", 0) // spec.num_cpus)
        num_workers += min(by_cpu, int(resources.get("GPU", 0) // spec.num_gpus)) if spec.num_gpus else by_cpu
    if num_workers == 0:
        raise ConfigError(
            f"ray: no node has num_cpus {spec.num_cpus} and num_gpus {spec.num_gpus:g} for a worker; {_nodes()} (where "
            "a cluster grows on demand, say num_workers)"
        )
    return num_workers


def _nodes() -> str:
    """What the cluster has, for a message."""
    has = _resources()
    each = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in has[:10])
    return f"the cluster has {len(has)} nodes: {each}{' ...' if len(has) > 10 else ''}"  # noqa: PLR2004 - enough to see


def _resources() -> list[dict[str, float]]:
    """What each node has, in use or not."""
    import ray  # noqa: PLC0415 - optional, and takes a second

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _follow(actor: Handle, done: Handle, name: str) -> None:
    """Wait for a call, and relay what its worker reports meanwhile."""
    import ray  # noqa: PLC0415 - optional, and takes a second

    report: Handle = None
    is_last = False
    while True:
        is_done = bool(ray.wait([done], timeout=POLL_S)[0])
        if report is None:
            report, is_last = actor.report.remote(), is_done
        if ray.wait([report], timeout=POLL_S)[0]:
            _relay(_got(report))
            report = None
            if is_last:
                return
        progress.check(name)


def _got(ref: Handle) -> Any:  # noqa: ANN401 - what the call returned
    import ray  # noqa: PLC0415 - optional, and takes a second

    return ray.get(ref)


def _relay(report: Report) -> None:
    """Say here what was said there."""
    for record in report.logged:
        logging.getLogger(record.name).handle(record)
    for words in report.said:
        progress.say(words)
    for call in report.metered:
        telemetry.tell(call)
    for stage, num_done, num_more in report.advanced:
        progress.advance(stage, num_done, num_more=num_more or None)


def _end(actor: Handle, done: Handle) -> None:
    """Let a stage end in order, so that nothing half written stays; the cluster ends what does not."""
    import ray  # noqa: PLC0415 - optional, and takes a second

    with suppress(ray.exceptions.RayError):
        actor.stop.remote()
        ray.wait([done], timeout=STOP_S)


def _reason(error: BaseException) -> str:
    """What Ray says, in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    exits = next((line for line in lines if "exit" in line), lines[0] if lines else type(error).__name__)
    return exits.partition("There are some potential root causes")[0].strip()
