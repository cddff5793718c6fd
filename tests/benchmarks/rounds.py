"""Rounds: processes that take turns, so that what the machine does meanwhile happens to every peer alike."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from tests.benchmarks import documents
from tests.benchmarks.peers import PEERS, REFERENCE
from tests.benchmarks.protocol import Setup, TrainingSetup, Work, first_line, rotated
from tests.benchmarks.worker import CEILING

ROOT = Path(__file__).parents[2]
LEAVE_S = 5.0  # for a process to end by itself
PATIENCE_S = 1800.0  # for an answer: one round of the slowest peer, with much to spare


class PeerError(Exception):
    """A process failed; the message is its reason."""


class Worker:
    """A process of `tests.benchmarks.worker`, or of another module that is started and answers as that does."""

    def __init__(
        self, name: str, setup: Setup | TrainingSetup, log: Path, module: str = "tests.benchmarks.worker"
    ) -> None:
        self._log = log
        quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        threads = {"OMP_NUM_THREADS": str(setup.num_threads), "TOKENIZERS_PARALLELISM": "true"}
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, name, json.dumps(asdict(setup))],
                cwd=ROOT,
                env=os.environ | quiet | threads,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                encoding="utf-8",
            )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            PeerError: it failed, or the process is gone.
        """
        if self._process.stdin is None:
            raise AssertionError("stdin is a pipe")
        with suppress(BrokenPipeError):  # the process is gone; the answer says why
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Wait for a line: the first says that the process has loaded.

        Raises:
            PeerError: it failed, or the process is gone.
        """
        if self._process.stdout is None:
            raise AssertionError("stdout is a pipe")
        hung = threading.Timer(PATIENCE_S, self._process.kill)
        hung.start()
        line = self._process.stdout.readline()
        is_late = not hung.is_alive()
        hung.cancel()
        if not line and is_late:
            self._process.wait()
            raise PeerError(f"it was stopped: no answer within {PATIENCE_S:,.0f} s")
        if not line:
            code = self._process.wait()
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise PeerError(f"its process {how}: {_last_line(self._log)}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise PeerError(reply["error"])
        return reply

    def close(self) -> None:
        """End the process; it listens for the end of its stdin even while it computes."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()
        try:
            self._process.wait(LEAVE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"


@dataclass(kw_only=True)
class Outcome:
    """What a peer did with one corpus."""

    peer: str
    seconds: list[float] = field(default_factory=list)
    """Of each round."""
    peak_rss_bytes: list[int] = field(default_factory=list)
    configuration: str = ""
    """The fastest on the probe, of a peer that has several."""
    tried: dict[str, float] = field(default_factory=dict)
    """Seconds of each configuration on the probe."""
    largest_difference: float | None = None
    """In any probability, against the reference; None where the reference did not run."""
    reason: str | None = None
    """Why there is no result."""


class Workers:
    """The processes of a run; a peer that failed stays out."""

    def __init__(self, setup: Setup, logs: Path) -> None:
        self._setup, self._logs = setup, logs
        self._workers: dict[str, Worker] = {}
        self.reasons: dict[str, str] = {}

    @classmethod
    @contextmanager
    def started(cls, names: list[str], setup: Setup, logs: Path) -> Iterator[Self]:
        """Export what is needed, load all peers, and end every process with the block."""
        workers = cls(setup, logs)
        logs.mkdir(parents=True, exist_ok=True)
        try:
            exports = sorted({export for name in names if (export := PEERS[name].export)})
            workers.start(exports)
            workers.start([CEILING, *[name for name in names if PEERS[name].export not in workers.reasons]])
            for name in names:
                if (export := PEERS[name].export) in workers.reasons:
                    workers.reasons[name] = f"cannot export the model: {workers.reasons[str(export)]}"
            for export in exports:
                workers.stop(export)
            yield workers
        finally:
            for name in list(workers._workers):
                workers.stop(name)

    def start(self, names: list[str]) -> None:
        """Start processes, as many at once as there are cores, and wait until they have loaded."""
        at_once = max(self._setup.num_threads, 1)
        for first in range(0, len(names), at_once):
            some = names[first : first + at_once]
            for name in some:
                self._workers[name] = Worker(name, self._setup, self._logs / f"{name}.txt")
            for name in some:
                try:
                    self._workers[name].answer()
                except PeerError as error:
                    self.fail(name, error)

    def stop(self, name: str) -> None:
        """End a process, if it runs."""
        worker = self._workers.pop(name, None)
        if worker is not None:
            worker.close()

    def fail(self, name: str, error: Exception) -> None:
        """Take a peer out."""
        self.reasons[name] = str(error) if isinstance(error, PeerError) else first_line(error)
        self.stop(name)

    def running(self, names: list[str]) -> list[str]:
        """Those that have not failed."""
        return [name for name in names if name in self._workers]

    def ask(self, name: str, **request: Any) -> dict[str, Any] | None:
        """Ask a process; None where it fails, and then it stays out."""
        try:
            return self._workers[name].ask(request)
        except PeerError as error:
            self.fail(name, error)
            return None

    def ceiling(self) -> dict[str, float | None]:
        """Operations per second that the machine can do now, by precision; empty where that failed."""
        if CEILING not in self._workers:
            return {}
        reply = self.ask(CEILING)
        return {} if reply is None else dict(reply["flops_per_s"])


def probe(workers: Workers, work: Work, outcomes: dict[str, Outcome]) -> dict[str, float]:
    """Warm every peer up on a few documents, let it choose its configuration, and return its seconds."""
    seconds = {}
    for name in workers.running(list(outcomes)):
        output = f"{work.output}-{name}"
        reply = workers.ask(name, work=asdict(work) | {"output": output}, probe=True)
        if reply is not None:
            seconds[name] = float(reply["seconds"])
            outcomes[name].configuration, outcomes[name].tried = reply["configuration"], reply["tried"]
    return seconds


def run_round(workers: Workers, work: Work, outcomes: dict[str, Outcome], *, number: int) -> dict[str, str]:
    """Let every peer score the corpus once, one after the other; returns outputs by peer."""
    outputs = {}
    for name in rotated(workers.running(list(outcomes)), number):
        output = f"{work.output}-{number}-{name}"
        reply = workers.ask(name, work=asdict(work) | {"output": output}, probe=False)
        if reply is not None:
            outcomes[name].seconds.append(float(reply["seconds"]))
            outcomes[name].peak_rss_bytes.append(int(reply["peak_rss_bytes"]))
            outputs[name] = output
    return outputs


def compare(workers: Workers, outputs: dict[str, str], outcomes: dict[str, Outcome]) -> None:
    """Compare what the peers of a round wrote with the reference's, where it took part."""
    if REFERENCE not in outputs:
        return
    reference = documents.read_scores(outputs[REFERENCE])
    for name, output in outputs.items():
        try:
            outcomes[name].largest_difference = documents.largest_difference(documents.read_scores(output), reference)
        except ValueError as error:
            workers.fail(name, error)


def remove(outputs: dict[str, str]) -> None:
    """Remove what a round wrote."""
    for output in map(Path, outputs.values()):
        shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)
