"""Data parallelism: one fine-tuning on several devices, each with its share of every batch of documents.

Hugging Face accelerate does what ranks do together: DistributedDataParallel, precision, loss scaling, collectives. It
was chosen over Lightning Fabric since transformers' users know it, it works with PyTorch's launcher, and it
leaves the loop to belt.

On one machine the process that fine-tunes is rank 0, starts the others, and ends them. On several, PyTorch's launcher
(`torchrun`) starts the same command everywhere: rank 0 does the work of a run, the others wait for what to do.
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
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import joblib
import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from belt_tasks import encoder, launcher
from belt_tasks.errors import ConfigError, TransientError
from belt_tasks.specs import Precision, TrainSpec

if TYPE_CHECKING:
    from accelerate import Accelerator

Int64 = npt.NDArray[np.int64]

PATIENCE = timedelta(minutes=10)
"""Of a rank that waits for another; one that is gone is mostly noticed at once."""
PATIENCE_FOR_WORK = timedelta(days=2)
"""Of a rank on another machine, until rank 0 has prepared the corpus."""
END_S = 10.0
TAIL_CHARS = 2000
READY = "ready"
SAID = "Error: "
"""Begins what a rank says of a mistake, as it ends."""
ENTRY = "belt_tasks.fine_tuning_rank"

_one_at_a_time = threading.Lock()
"""accelerate keeps one state for a process."""


@dataclass(frozen=True)
class Ranks:
    """The processes of one fine-tuning, as one of them sees them."""

    accelerator: "Accelerator"

    @property
    def rank(self) -> int:
        """This process, from 0."""
        return int(self.accelerator.process_index)

    @property
    def size(self) -> int:
        """How many there are."""
        return int(self.accelerator.num_processes)

    @property
    def device(self) -> torch.device:
        """This rank's."""
        device: torch.device = self.accelerator.device
        return device

    def share(self, documents: Int64) -> Int64:
        """This rank's part of some documents, possibly none."""
        return documents[self.rank :: self.size]

    def sum(self, number: float) -> float:
        """A number of each rank's, added up."""
        if self.size == 1:
            return number
        total = self.accelerator.reduce(torch.tensor(number, dtype=torch.float64, device=self.device), "sum")
        return float(total.item())

    def gather(self, rows: Tensor, *, num_rows: int) -> Tensor:
        """Rows [num_rows, ...] on the CPU, of which each rank has those of its `share`."""
        if self.size == 1:
            return rows
        mine = rows.new_zeros((-(-num_rows // self.size), *rows.shape[1:]))
        mine[: len(rows)] = rows
        parts = self.accelerator.gather(mine.to(self.device)).view(self.size, *mine.shape)
        gathered: Tensor = parts.transpose(0, 1).flatten(0, 1)[:num_rows].cpu()
        return gathered

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss to the weights, scaled where precision asks for it."""
        self.accelerator.backward(loss)

    def accumulating(self, module: nn.Module, *, is_last: bool) -> AbstractContextManager[Any]:
        """For the forward and backward of one of several batches: gradients are averaged over ranks with the last."""
        return nullcontext() if is_last else self.accelerator.no_sync(module)


def check(spec: TrainSpec) -> None:
    """See that a fine-tuning can have such devices.

    Raises:
        ConfigError: this machine has fewer, the spec names one of them, or a CPU cannot compute so.
    """
    chosen = encoder.choose_device(spec.device)
    if spec.precision == "fp16" and chosen.type == "cpu":
        raise ConfigError("precision fp16 needs a GPU to fine-tune on; on a CPU it must be fp32 or bf16")
    if spec.num_devices == 1:
        return
    if launcher.is_launched():
        raise ConfigError(
            f"num_devices is {spec.num_devices}, but a launcher started this process as one of "
            f"{os.environ['WORLD_SIZE']}: leave num_devices at 1"
        )
    if chosen.index is not None:
        raise ConfigError(
            f"device {spec.device!r} is one device, but num_devices is {spec.num_devices}: say cuda, or auto"
        )
    there = torch.cuda.device_count() if chosen.type == "cuda" else joblib.cpu_count()
    if spec.num_devices > there:
        what = "CUDA devices" if chosen.type == "cuda" else "cores"
        raise ConfigError(f"num_devices must be at most {there}, the {what} of this machine, got {spec.num_devices}")


@contextmanager
def ranks(spec: TrainSpec, job: dict[str, Any]) -> Iterator[Ranks]:
    """Start the other ranks, or tell those that a launcher started what to do, and end them with the block.

    Args:
        spec: device, precision, and how many ranks there are.
        job: what the others have to do, as JSON; see `ENTRY`. It is handed over by a pipe: it may hold secrets, which
            ranks of a launcher are not told.

    Raises:
        ConfigError: this machine has fewer devices, or a rank says what a person has to mend.
        TransientError: a rank was killed.
        RuntimeError: a rank failed otherwise; has its last words.
    """
    check(spec)
    if launcher.is_launched():
        with launched(spec.device, spec.precision) as here:
            told(job | {"storage": None, "tokens": None})
            yield here
        return
    num_devices = spec.num_devices
    if num_devices == 1:
        with alone(spec.device, spec.precision) as here:
            yield here
        return
    with tempfile.TemporaryDirectory(prefix="belt-ranks-") as folder, _cores(num_devices):
        others: list[_Other] = []
        is_joined = False
        try:
            others.extend(_Other(rank, num_devices, Path(folder), job) for rank in range(1, num_devices))
            for other in others:
                other.wait_until_ready()
            with joined(0, num_devices, spec, folder) as here:
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
def alone(device: str, precision: Precision) -> Iterator[Ranks]:
    """Be the only rank."""
    chosen = encoder.choose_device(device)
    with _accelerated(precision, chosen, {"ACCELERATE_TORCH_DEVICE": str(chosen)}) as ranks:
        yield ranks


@contextmanager
def joined(rank: int, size: int, spec: TrainSpec, folder: str) -> Iterator[Ranks]:
    """Be one of the ranks that meet in a folder of this machine; nothing is reachable from another."""
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    numbers |= {"OMP_NUM_THREADS": torch.get_num_threads()}  # or accelerate counts cores that a container may not use
    environment = {name: str(value) for name, value in numbers.items()}
    chosen = encoder.choose_device(spec.device)
    if chosen.type == "cuda":
        torch.cuda.set_device(rank)
    with _environment({"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}):
        dist.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=size,
            timeout=PATIENCE,
        )
        with _accelerated(spec.precision, chosen, environment) as ranks:
            yield ranks


@contextmanager
def launched(device: str, precision: Precision) -> Iterator[Ranks]:
    """Be one of the ranks that a launcher started."""
    with _accelerated(precision, encoder.choose_device(device), {}) as ranks:
        yield ranks


def dismiss(spec: TrainSpec) -> None:
    """Tell the ranks that a launcher started, if there are any, that there is nothing to do."""
    if launcher.is_launched():
        with launched(spec.device, spec.precision):
            told({})


def told(job: dict[str, Any] | None = None) -> dict[str, Any]:
    """What rank 0 tells all to do, nothing if it is empty; the others wait for it."""
    from accelerate.utils import broadcast_object_list  # noqa: PLC0415 - a quarter of a second of every command

    words = [None if job is None else json.dumps(job)]
    broadcast_object_list(words)
    found: dict[str, Any] = json.loads(words[0] or "{}")
    return found


@contextmanager
def _accelerated(precision: Precision, device: torch.device, environment: dict[str, str]) -> Iterator[Ranks]:
    """A rank's Accelerator, configured by environment variables."""
    from accelerate import (  # noqa: PLC0415 - a quarter of a second of every command
        Accelerator,
        DistributedDataParallelKwargs,
        InitProcessGroupKwargs,
    )
    from accelerate.state import AcceleratorState  # noqa: PLC0415

    with _one_at_a_time, _environment(environment):
        try:
            AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001 - an earlier one of this process
            yield Ranks(
                Accelerator(
                    cpu=device.type == "cpu",
                    device_placement=False,
                    mixed_precision={"fp32": "no"}.get(precision, precision),
                    kwargs_handlers=[
                        InitProcessGroupKwargs(timeout=PATIENCE_FOR_WORK),
                        DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                    ],
                )
            )
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Variables, which are as before when the block ends."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


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
