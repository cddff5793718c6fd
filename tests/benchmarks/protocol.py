"""What the benchmark and its processes tell each other: references on disk, one line of JSON each way.

Every peer runs in a process of its own, so that its memory is its own and rounds can take turns.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import psutil

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What every process is started with."""

    checkpoint: str
    """Folder of a belt checkpoint: the encoder, its tokenizer, and a linear head on the first token."""
    exports: str
    """Folder for the model in the formats of other runtimes."""
    num_threads: int
    """Cores that every peer may use."""


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """What every process is started with that computes gradients."""

    encoder: str
    """Folder of an encoder and its tokenizer."""
    chunk_size: int
    max_batch_tokens: int
    device: str
    num_threads: int
    """Cores that every way may use."""
    most_bytes: int
    """A process that needs more for its step ends itself."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One round: Parquet in, Parquet out."""

    corpus: str
    """Parquet file with doc_id and text."""
    output: str
    """Not there yet; a Parquet file with doc_id and probabilities, or of belt a folder with its published run."""
    chunk_size: int
    stride: int


Score = Callable[[Work], None]
Configurations = dict[str, Callable[[], Score]]
"""Ways to run one peer, by name; a probe tries each and the rounds use the fastest. Building one is not timed."""


class UnavailableError(Exception):
    """This machine or installation cannot run a peer; the message says why."""


def num_cores() -> int:
    """Physical cores that this process may use; matrix products gain nothing from a second thread on a core."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(min(allowed, psutil.cpu_count(logical=False) or allowed), 1)


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed: pip install 'belt[bench]'"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = lines[0] if lines else "no message"
    return message if isinstance(error, UnavailableError) else f"{type(error).__name__}: {message}"


def rotated(names: Sequence[str], by: int) -> list[str]:
    """The order of one round: each round begins with another peer, so that nobody always follows the same one."""
    by %= max(len(names), 1)
    return [*names[by:], *names[:by]]
