"""A process of the benchmark: loads one thing, then answers each line on stdin with a line of JSON on stdout.

    python -m tests.benchmarks.worker NAME SETUP_JSON

It ends when stdin does, so it never outlives the benchmark, however that ends. What libraries print goes to stderr.
"""

import gc
import json
import os
import queue
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks import peers
from tests.benchmarks.protocol import Configurations, Score, Setup, Work, first_line

Reply = dict[str, Any]
Answer = Callable[[dict[str, Any]], Reply]
CEILING = "ceiling"
KIB = 1024


@dataclass
class ServedPeer:
    """A loaded peer and the configuration that its last probe found fastest."""

    configurations: Configurations
    chosen: tuple[str, Score] | None = field(default=None)

    def answer(self, request: dict[str, Any]) -> Reply:
        """Probe, or run a round."""
        work = Work(**request["work"])
        if request["probe"]:
            return self.probe(work)
        if self.chosen is None:
            raise AssertionError("probe first")
        reset_peak_rss()
        seconds = timed(self.chosen[1], work)
        return {"seconds": seconds, "peak_rss_bytes": peak_rss_bytes(), "output": work.output}

    def probe(self, work: Work) -> Reply:
        """Warm up; where there are several configurations, keep the fastest for the rounds."""
        self.chosen = None
        tried: dict[str, float] = {}
        for i, (name, build) in enumerate(self.configurations.items()):
            gc.collect()
            score = build()
            # the first run pays for what is made once
            runs = [Work(**(vars(work) | {"output": f"{work.output}-{i}-{run}"})) for run in range(2)]
            tried[name] = min([timed(score, run) for run in runs])
            if self.chosen is None or tried[name] == min(tried.values()):
                self.chosen = name, score
        gc.collect()
        return {"seconds": min(tried.values()), "configuration": self.chosen[0] if self.chosen else "", "tried": tried}


def timed(score: Score, work: Work) -> float:
    """Seconds from opening the corpus to the closed output."""
    started = time.perf_counter()
    score(work)
    return time.perf_counter() - started


def load(name: str, setup: Setup) -> Answer:
    """What answers the requests of this process."""
    if name in peers.EXPORTS:
        peers.export(name, setup)
        return lambda _: {}
    if name == CEILING:
        from tests.benchmarks.ceiling import ceiling

        measure = ceiling(setup)
        return lambda _: {"flops_per_s": measure()}
    return ServedPeer(peers.configurations(name, setup)).answer


def reset_peak_rss() -> None:
    """Forget the peak so far, where the system can."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists() and os.access(clear, os.W_OK):
        clear.write_text("5", encoding="ascii")


def peak_rss_bytes() -> int:
    """The most memory that this process had at once, since `reset_peak_rss` or since its start."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the parent had before it started this process
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * KIB for line in lines if line.startswith("VmHWM:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * KIB


def serve(load: Callable[[], Answer]) -> None:
    """Load, say so, and answer until stdin ends."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the benchmark is told, and ends its processes
    requests: queue.Queue[str] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            requests.put(line)
        os._exit(0)  # the benchmark is gone, whatever is running here

    threading.Thread(target=listen, daemon=True).start()

    def say(act: Callable[[], Reply]) -> bool:
        try:
            reply = act()
        except Exception as error:  # noqa: BLE001 - whatever a peer raises becomes the reason in its row
            traceback.print_exc()
            reply = {"error": first_line(error)}
        print(json.dumps(reply), file=replies, flush=True)
        return "error" not in reply

    loaded: list[Answer] = []
    if not say(lambda: loaded.append(load()) or {"ready": True}):
        return
    while True:
        request = json.loads(requests.get())
        say(lambda request=request: loaded[0](request))


if __name__ == "__main__":
    serve(partial(load, sys.argv[1], Setup(**json.loads(sys.argv[2]))))
