"""Workers: mini-batches through an encoder, on all of the machine and once.

On a CPU several threads each take one mini-batch at a time and compute it on one core: nobody waits for anybody, a
mini-batch stays in its core's cache, and two jobs on one machine share it fairly (with one operator spread over all
cores, each job's threads spin while they wait for the other's). On a GPU one thread is ahead of the device.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, wait
from contextlib import contextmanager

import joblib
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from belt_tasks.batches import MiniBatch
from belt_tasks.engine import ChunkEncoder
from belt_tasks.threads import Threads

Int64 = npt.NDArray[np.int64]

# beyond, Python's own lock would be what they wait for; further cores work inside the operators
MOST_WORKERS = 8

# mini-batches that a GPU has been given and not finished: enough that it never waits for the next
MOST_IN_FLIGHT = 4

# the workers of one call use the whole machine, and PyTorch's number of threads is the process's
_machine = threading.Lock()


def encode_all(
    encoder: ChunkEncoder,
    plan: list[Int64],
    collate: Callable[[Int64], MiniBatch],
    *,
    on_done: Callable[[Int64], None],
) -> Tensor:
    """Chunk outputs of all mini-batches of a plan.

    Out of memory, a mini-batch is halved, down to one chunk, and so are all those after it that are as large.

    Args:
        encoder: what encodes.
        plan: rows of each mini-batch, a permutation of 0 .. C - 1 in all; taken in order.
        collate: makes a mini-batch of its rows.
        on_done: called with the rows of each finished mini-batch, by one thread at a time; what it raises ends the
            others too.

    Returns:
        float32 [C, K] on the CPU, in row order.

    Raises:
        torch.OutOfMemoryError: one chunk alone does not fit.
    """
    job = _Job(encoder, plan, collate, on_done)
    if encoder.device.type != "cpu":
        job.work()
        return job.result()
    with _machine, _cores_of_workers(len(plan)) as num_workers:
        if num_workers == 1:
            job.work()
            return job.result()
        with Threads(num_workers, thread_name_prefix="encode") as pool:
            try:
                futures = [pool.submit(job.work) for _ in range(num_workers)]
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            finally:  # an error in one, or Ctrl-C here, ends all after their present mini-batch
                job.stop()
            for future in done:
                future.result()
    return job.result()


class _Job:
    """What the workers share."""

    def __init__(
        self,
        encoder: ChunkEncoder,
        plan: list[Int64],
        collate: Callable[[Int64], MiniBatch],
        on_done: Callable[[Int64], None],
    ) -> None:
        self._encoder = encoder
        self._collate = collate
        self._on_done = on_done
        self._todo = plan[::-1]
        self._lock = threading.Lock()
        self._finished: list[tuple[Int64, Tensor]] = []
        self._most_tokens: int | None = None
        self._stopped = False

    def work(self) -> None:
        """Encode until nothing is left to do."""
        in_flight: deque[tuple[Int64, Tensor, torch.cuda.Event | None]] = deque()
        with torch.inference_mode():
            while (rows_B := self._take()) is not None:
                batch = self._collate(rows_B)
                if self._is_too_large(batch):
                    self._halve(rows_B)
                    continue
                try:
                    outputs_BK = self._encoder.encode(batch)
                except torch.OutOfMemoryError:
                    if len(rows_B) == 1:
                        raise
                    self._lower_budget(batch)
                    self._halve(rows_B)
                    continue
                in_flight.append((rows_B, outputs_BK, self._event()))
                while in_flight and (in_flight[0][2] is None or len(in_flight) > MOST_IN_FLIGHT):
                    self._finish(*in_flight.popleft())
            while in_flight:
                self._finish(*in_flight.popleft())

    def stop(self) -> None:
        """Let nobody begin anything."""
        with self._lock:
            self._stopped = True

    def result(self) -> Tensor:
        """All outputs in row order."""
        rows_C = torch.from_numpy(np.concatenate([rows_B for rows_B, _ in self._finished]))
        return torch.cat([outputs_BK for _, outputs_BK in self._finished]).cpu()[torch.argsort(rows_C)]

    def _take(self) -> Int64 | None:
        with self._lock:
            return self._todo.pop() if self._todo and not self._stopped else None

    def _event(self) -> torch.cuda.Event | None:
        """What a GPU reaches when the outputs are there; on a CPU they are there already."""
        if self._encoder.device.type != "cuda":
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._encoder.device))
        return event

    def _finish(self, rows_B: Int64, outputs_BK: Tensor, event: torch.cuda.Event | None) -> None:
        if event is not None:
            event.synchronize()
        with self._lock:
            self._finished.append((rows_B, outputs_BK))
            self._on_done(rows_B)

    def _is_too_large(self, batch: MiniBatch) -> bool:
        return self._most_tokens is not None and len(batch) > 1 and len(batch.input_ids_T) > self._most_tokens

    def _lower_budget(self, batch: MiniBatch) -> None:
        """For the rest of this job, and for later ones that leave the budget to the encoder."""
        self._most_tokens = len(batch.input_ids_T) // 2
        self._encoder.batch_tokens = min(self._encoder.batch_tokens, self._most_tokens)
        if self._encoder.device.type == "cuda":
            torch.cuda.empty_cache()

    def _halve(self, rows_B: Int64) -> None:
        with self._lock:
            self._todo += [rows_B[len(rows_B) // 2 :], rows_B[: len(rows_B) // 2]]


@contextmanager
def _cores_of_workers(most_workers: int) -> Iterator[int]:
    """How many workers there should be; while the block lasts PyTorch gives each of them its share of the cores."""
    num_threads = torch.get_num_threads()  # all cores that this process may run on, or what OMP_NUM_THREADS says
    num_cores = min(num_threads, joblib.cpu_count())  # a container has a share of the machine that PyTorch ignores
    # never more than its share, even if it works alone: operators spread over cores that others use wait for these
    torch.set_num_threads(max(1, num_cores // MOST_WORKERS))
    try:
        yield max(1, min(num_cores, MOST_WORKERS, most_workers))
    finally:
        torch.set_num_threads(num_threads)
