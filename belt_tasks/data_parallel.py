"""Data parallelism: one fine-tuning on several devices of a machine, each with its share of every batch of documents.

The process that fine-tunes is rank 0. It starts the others, which read the same data and take the same steps, and ends
them. Gradients are summed over all ranks before each move of the optimizer, so that every rank holds the same weights:
the arithmetic of DistributedDataParallel (Li et al. 2020, arXiv 2006.15704). That class itself does not fit: it sums
with every backward pass, and the exact gradient of long documents takes one for every mini-batch of chunks.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import joblib
import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from belt_tasks import encoder
from belt_tasks.errors import ConfigError, TransientError

Int64 = npt.NDArray[np.int64]

PATIENCE = timedelta(minutes=10)
"""Of a rank that waits for another; one that is gone is mostly noticed at once."""
END_S = 10.0
TAIL_CHARS = 2000
READY = "ready"
SAID = "Error: "
"""Begins what a rank says of a mistake, as it ends."""
ENTRY = "belt_tasks.fine_tuning_rank"


@dataclass(frozen=True)
class Ranks:
    """The processes of one fine-tuning, as one of them sees them."""

    rank: int = 0
    size: int = 1
    device: torch.device | None = None
    """This rank's; None is the spec's."""

    def share(self, documents: Int64) -> Int64:
        """This rank's part of some documents, possibly none."""
        return documents[self.rank :: self.size]

    def sum(self, number: float) -> float:
        """A number of each rank's, added up."""
        if self.size == 1:
            return number
        total = torch.tensor(number, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total.item())

    def gather(self, rows: Tensor, *, num_rows: int) -> Tensor:
        """Rows [num_rows, ...] on the CPU, of which each rank has those of its `share`."""
        if self.size == 1:
            return rows
        most = -(-num_rows // self.size)
        mine = rows.new_zeros((most, *rows.shape[1:]))
        mine[: len(rows)] = rows
        parts = [torch.zeros_like(mine, device=self.device) for _ in range(self.size)]
        dist.all_gather(parts, mine.to(self.device))
        return torch.stack(parts, dim=1).flatten(0, 1)[:num_rows].cpu()

    def sum_gradients(self, model: nn.Module) -> None:
        """Add up the gradients of all ranks; a weight that no rank used keeps none."""
        if self.size == 1:
            return
        weights = list(model.parameters())
        is_used = torch.tensor([weight.grad is not None for weight in weights], dtype=torch.int32, device=self.device)
        dist.all_reduce(is_used)
        used = [weight for weight, number in zip(weights, is_used.tolist(), strict=True) if number]
        flat = torch.cat([(torch.zeros_like(it) if it.grad is None else it.grad).flatten() for it in used])
        dist.all_reduce(flat)
        for weight, part in zip(used, torch.split(flat, [weight.numel() for weight in used]), strict=True):
            weight.grad = part.view_as(weight)


ALONE = Ranks()


def check(num_devices: int, device: str) -> None:
    """See that a fine-tuning can have so many devices.

    Raises:
        ConfigError: this machine has fewer, or the spec names one of them.
    """
    if num_devices == 1:
        return
    chosen = encoder.choose_device(device)
    if chosen.index is not None:
        raise ConfigError(f"device {device!r} is one device, but num_devices is {num_devices}: say cuda, or auto")
    there = torch.cuda.device_count() if chosen.type == "cuda" else joblib.cpu_count()
    if num_devices > there:
        what = "CUDA devices" if chosen.type == "cuda" else "cores"
        raise ConfigError(f"num_devices must be at most {there}, the {what} of this machine, got {num_devices}")


@contextmanager
def ranks(num_devices: int, device: str, job: dict[str, Any]) -> Iterator[Ranks]:
    """Start the other ranks, and end them with the block, however it ends.

    Args:
        num_devices: how many ranks there are.
        device: the spec's.
        job: what the others have to do, as JSON; see `ENTRY`. It is handed over by a pipe: it may hold secrets.

    Raises:
        ConfigError: this machine has fewer devices, or a rank says what a person has to mend.
        TransientError: a rank was killed.
        RuntimeError: a rank failed otherwise; has its last words.
    """
    check(num_devices, device)
    if num_devices == 1:
        yield ALONE
        return
    with tempfile.TemporaryDirectory(prefix="belt-ranks-") as folder, _cores(num_devices):
        others: list[_Other] = []
        is_joined = False
        try:
            others.extend(_Other(rank, num_devices, Path(folder), job) for rank in range(1, num_devices))
            for other in others:
                other.wait_until_ready()
            with joined(0, num_devices, device, folder) as here:
                is_joined = True
                try:
                    yield here
                except RuntimeError as error:  # of a collective where another rank is gone, or of this rank itself
                    _say_who_ended(others, error)  # while all are connected: later the others end of this one
                    raise
        except RuntimeError as error:
            if not is_joined:
                _say_who_ended(others, error)
            raise
        finally:
            for other in others:
                other.end()


@contextmanager
def joined(rank: int, size: int, device: str, folder: str) -> Iterator[Ranks]:
    """Be one of the ranks that meet in a folder of this machine; nothing is reachable from another."""
    chosen = encoder.choose_device(device)
    mine = torch.device("cuda", rank) if chosen.type == "cuda" else chosen
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    os.environ.update({"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback})
    if mine.type == "cuda":
        torch.cuda.set_device(mine)
    dist.init_process_group(
        "nccl" if mine.type == "cuda" else "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=size,
        timeout=PATIENCE,
    )
    try:
        yield Ranks(rank, size, mine)
    finally:
        dist.destroy_process_group()


def end_with_parent(pipe: IO[str], folder: str) -> None:
    """Exit, and remove the folder, as soon as the parent's pipe closes."""

    def wait() -> None:
        pipe.read()
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _say_who_ended(others: "list[_Other]", error: RuntimeError) -> None:
    """Raise what ended another rank, if one ended."""
    patience_s = END_S
    for other in others:
        other.check(error, patience_s)
        patience_s = 0.0  # whoever is gone is gone by now


class _Other:
    """Another rank's process, as rank 0 sees it."""

    def __init__(self, rank: int, size: int, folder: Path, job: dict[str, Any]) -> None:
        self._rank = rank
        self._said = (folder / f"rank-{rank}.log").open("w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(  # noqa: S603 - one of our own
            [sys.executable, "-m", ENTRY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            start_new_session=True,  # Ctrl-C is for rank 0, which ends the others
        )
        told = {"rank": rank, "size": size, "folder": str(folder), **job}
        try:
            self._stdin.write(json.dumps(told) + "\n")
            self._stdin.flush()
        except BrokenPipeError:
            self.check(None, END_S)

    @property
    def _stdin(self) -> IO[str]:
        if self._process.stdin is None:
            raise AssertionError("it was started with a pipe")
        return self._process.stdin

    def wait_until_ready(self) -> None:
        """Return when it has read its data; see `check` for what is raised where it cannot."""
        if self._process.stdout is None:
            raise AssertionError("it was started with a pipe")
        if self._process.stdout.readline().strip() != READY:
            self.check(None, END_S)

    def check(self, cause: Exception | None, patience_s: float) -> None:
        """Say why it ended, if it did.

        Raises:
            ConfigError: it said what a person has to mend.
            TransientError: it was killed.
            RuntimeError: anything else.
        """
        try:
            code = self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            return
        self._said.seek(0)
        said = self._said.read()[-TAIL_CHARS:].strip()
        kind: type[Exception]
        if code < 0 or not said:
            kind, why = TransientError if code < 0 else RuntimeError, f"exit code {code}"
        elif SAID in said:
            kind, why = ConfigError, said.rpartition(SAID)[2]
        else:
            kind, why = RuntimeError, said.splitlines()[-1]
        raise kind(f"rank {self._rank} of the fine-tuning ended: {why}") from cause

    def end(self) -> None:
        """It is not needed any more."""
        self._stdin.close()
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._said.close()


@contextmanager
def _cores(num_ranks: int) -> Iterator[None]:
    """Of the machine's cores, this rank has its share."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, joblib.cpu_count()) // num_ranks))
    try:
        yield
    finally:
        torch.set_num_threads(before)
