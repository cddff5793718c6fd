"""Workers: mini-batches through an encoder, on all of the machine and once.

On a CPU several threads each take one mini-batch at a time and compute it on one core: nobody waits for anybody, a
mini-batch stays in its core's cache, and two jobs on one machine share it fairly (with one operator spread over all
cores, each job's threads spin while they wait for the other's). On a GPU one thread is ahead of the device.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from belt_tasks.batches import MiniBatch
from belt_tasks.engine import ChunkEncoder

Int64 = npt.NDArray[np.int64]

# beyond, Python's own lock would be what they wait for; further cores work inside the operators
MOST_WORKERS = 8

# the workers of one call use the whole machine, and PyTorch's number of threads is the process's
_machine = threading.Lock()


def encode_all(
    encoder: ChunkEncoder,
    plan: list[Int64],
    collate: Callable[[Int64], MiniBatch],
    *,
    on_done: Callable[[int], None],
) -> Tensor:
    """Chunk outputs of all mini-batches of a plan.

    Out of memory, a mini-batch is halved, down to one chunk, and so are all those after it that are as large.

    Args:
        encoder: what encodes.
        plan: rows of each mini-batch, a permutation of 0 .. C - 1 in all; taken in order.
        collate: makes a mini-batch of its rows.
        on_done: called with the number of chunks of each finished mini-batch, by one thread at a time; what it raises
            ends the others too.

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
        with ThreadPoolExecutor(num_workers, thread_name_prefix="encode") as pool:
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
        on_done: Callable[[int], None],
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
                    self._most_tokens = len(batch.input_ids_T) // 2
                    if self._encoder.device.type == "cuda":
                        torch.cuda.empty_cache()
                    self._halve(rows_B)
                    continue
                with self._lock:
                    self._finished.append((rows_B, outputs_BK))
                    self._on_done(len(rows_B))

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

    def _is_too_large(self, batch: MiniBatch) -> bool:
        return self._most_tokens is not None and len(batch) > 1 and len(batch.input_ids_T) > self._most_tokens

    def _halve(self, rows_B: Int64) -> None:
        with self._lock:
            self._todo += [rows_B[len(rows_B) // 2 :], rows_B[: len(rows_B) // 2]]


@contextmanager
def _cores_of_workers(most_workers: int) -> Iterator[int]:
    """How many workers there should be; while the block lasts PyTorch gives each of them its share of the cores."""
    num_cores = torch.get_num_threads()  # all of them, or what OMP_NUM_THREADS allows
    num_workers = max(1, min(num_cores, MOST_WORKERS, most_workers))
    torch.set_num_threads(max(1, num_cores // num_workers))
    try:
        yield num_workers
    finally:
        torch.set_num_threads(num_cores)
