"""A process of the fine-tuning benchmark: loads the model, then computes gradients as it is asked.

    python -m tests.benchmarks.training_worker DROPOUT SETUP_JSON

A request names a way and the lengths of the documents, and what is wanted: `seconds` of the step, the `peak_bytes`
that it needs above what the process had before, or the `differences` of its gradient from that of one pass.
"""

import gc
import json
import os
import sys
import threading
import time
from contextlib import ExitStack
from functools import partial
from typing import Any

import psutil
import torch

from belt_tasks import data_parallel, memory
from belt_tasks.data_parallel import Ranks
from tests.benchmarks import training_ways
from tests.benchmarks.protocol import TrainingSetup
from tests.benchmarks.training_ways import REFERENCE, WAYS, AddGradient, Pooling
from tests.benchmarks.worker import Answer, Reply, peak_rss_bytes, reset_peak_rss, serve

WARM_UP_LENGTHS = (8,)
LOOK_EVERY_S = 0.02
OVER_LIMIT = 3  # the exit code of a process that needed more than it may


class TrainingWorker:
    """The model, and the steps that were prepared."""

    def __init__(self, dropout: float, setup: TrainingSetup, ranks: Ranks) -> None:
        self._dropout, self._setup, self._ranks = dropout, setup, ranks
        self._model = training_ways.build_model(setup, dropout=dropout)
        self._prepared: dict[tuple[str, tuple[int, ...], Pooling], AddGradient] = {}

    def answer(self, request: dict[str, Any]) -> Reply:
        """Do what is asked for, and give the memory back."""
        name, lengths = request["way"], tuple(request["lengths"])
        pooling = request.get("pooling", WAYS[name].pooling)
        try:
            match request["wanted"]:
                case "seconds":
                    return self.seconds(self._step(name, lengths, pooling))
                case "peak_bytes":
                    self._step(
                        name, WARM_UP_LENGTHS, pooling
                    )()  # what is loaded or made once, however long documents are
                    return self.peak_bytes(self._step(name, lengths, pooling))
                case "differences":
                    return self.differences(name, lengths, pooling)
                case other:
                    raise AssertionError(other)
        finally:
            self._give_back()

    def seconds(self, add_gradient: AddGradient) -> Reply:
        """Of one step, and its loss; on a GPU of a second one, since the first asks the driver for memory."""
        if self._is_cuda:
            add_gradient()
            self._model.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
        started = time.perf_counter()
        loss = add_gradient()
        if self._is_cuda:
            torch.cuda.synchronize()
        return {"seconds": time.perf_counter() - started, "loss": loss}

    def peak_bytes(self, add_gradient: AddGradient) -> Reply:
        """The most memory that one step needs at once, its gradient included, above what was there before."""
        self._give_back()
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            add_gradient()
            return {"peak_bytes": torch.cuda.max_memory_allocated() - before, "before_bytes": before}
        reset_peak_rss()
        before = rss_bytes()
        add_gradient()
        return {"peak_bytes": peak_rss_bytes() - before, "before_bytes": before}

    def differences(self, name: str, lengths: tuple[int, ...], pooling: Pooling) -> Reply:
        """Of a way's gradient from that of one pass: its norm, and the largest of any number, over the norm of that."""
        gradients = []
        for way in (REFERENCE, name):
            self._step(way, lengths, pooling)()
            gradients.append(training_ways.gradient_T(self._model))
            self._give_back()
        expected_T, found_T = gradients
        difference_T = found_T - expected_T
        norm = expected_T.norm()
        return {"norm": (difference_T.norm() / norm).item(), "largest": (difference_T.abs().max() / norm).item()}

    @property
    def _is_cuda(self) -> bool:
        return self._ranks.device.type == "cuda"

    def _step(self, name: str, lengths: tuple[int, ...], pooling: Pooling) -> AddGradient:
        asked = name, lengths, pooling
        if asked not in self._prepared:
            trainer = training_ways.build_trainer(
                self._setup, self._model, self._ranks, lengths, pooling=pooling, dropout=self._dropout
            )
            self._prepared[asked] = WAYS[name].prepare(trainer)
        return self._prepared[asked]

    def _give_back(self) -> None:
        self._model.zero_grad(set_to_none=True)
        gc.collect()
        if self._is_cuda:
            torch.cuda.empty_cache()
        memory.give_back()


def rss_bytes() -> int:
    """The memory that this process has now."""
    return int(psutil.Process().memory_info().rss)


def limit_memory(setup: TrainingSetup, device: torch.device) -> None:
    """Let this process end itself before it takes more memory than it may."""
    if device.type == "cuda":
        total_bytes = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(setup.most_bytes / total_bytes, 1.0), device)
        return
    before_bytes = rss_bytes()

    def watch() -> None:
        while rss_bytes() - before_bytes <= setup.most_bytes:
            time.sleep(LOOK_EVERY_S)
        print(f"it needs more than {setup.most_bytes / 2**30:.1f} GiB", file=sys.stderr, flush=True)
        os._exit(OVER_LIMIT)

    threading.Thread(target=watch, daemon=True).start()


def load(dropout: float, setup: TrainingSetup, stack: ExitStack) -> Answer:
    """What answers the requests of this process."""
    ranks = stack.enter_context(data_parallel.alone(setup.device, "fp32"))
    worker = TrainingWorker(dropout, setup, ranks)
    limit_memory(setup, ranks.device)
    return worker.answer


if __name__ == "__main__":
    with ExitStack() as entered:
        serve(partial(load, float(sys.argv[1]), TrainingSetup(**json.loads(sys.argv[2])), entered))
