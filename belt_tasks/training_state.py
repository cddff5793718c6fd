"""Training states: what a fine-tuning that was killed goes on from, bit for bit.

A state is one safetensors file: weights, the optimizer's moments and the best weights so far, with everything else as
JSON among its metadata. Its name ends with the digest of its bytes, so a file that was cut short or damaged is noticed
and the one before it is taken. Random numbers have no state: dropout and the order of documents are functions of the
seed and the position.
"""

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from belt_tasks import storage

log = logging.getLogger(__name__)

NUM_KEPT = 2
DIGEST_DIGITS = 16
_NAME = re.compile(rf"step-(\d+)-([0-9a-f]{{{DIGEST_DIGITS}}})\.safetensors$")


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Where a fine-tuning is."""

    num_steps: int
    """Optimizer steps that are done."""
    tensors: dict[str, Tensor]
    """On the CPU."""
    told: dict[str, Any]
    """What JSON can hold."""


@dataclass(frozen=True)
class TrainingStates:
    """The states of one run, in a folder of it."""

    uri: str

    def save(self, state: TrainingState) -> None:
        """Keep a state, and of the earlier ones only the last.

        Raises:
            ConfigError: it cannot be written; earlier ones are still there.
            TransientError: the store did not answer.
        """
        with storage.staged_file(self.uri) as (path, put):
            tensors = {name: tensor.contiguous() for name, tensor in state.tensors.items()}
            try:
                save_file(tensors, path, metadata={"told": json.dumps(state.told)})
            except SafetensorError as error:  # its words for a disk that is full
                raise OSError(str(error)) from error
            digest = storage.sha256_of_file(path)[:DIGEST_DIGITS]
            put(f"step-{state.num_steps:010d}-{digest}.safetensors")
        storage.remove_files([uri for uri, _ in self._found()[NUM_KEPT:]])

    def last(self) -> TrainingState | None:
        """The last state that is whole; None where there is none.

        Raises:
            TransientError: the store did not answer.
        """
        for uri, digest in self._found():
            with storage.local_file(uri) as path:
                if storage.sha256_of_file(path)[:DIGEST_DIGITS] == digest:
                    return _read(path)
            log.warning("%s is damaged: the fine-tuning goes on from the state before it", uri)
        return None

    def remove(self) -> None:
        """Keep none, nor what a killed process had half written: the fine-tuning is over."""
        storage.remove_files([file.uri for file in storage.files_under(self.uri, hidden=True) or []])
        storage.remove_empty_directories([self.uri])

    def _found(self) -> list[tuple[str, str]]:
        """URI and digest of each, the last first."""
        files = storage.files_under(self.uri, suffix=".safetensors") or []
        found = [(file.uri, _NAME.search(file.uri)) for file in files]
        whole = [(int(match[1]), uri, match[2]) for uri, match in found if match is not None]
        return [(uri, digest) for _, uri, digest in sorted(whole, reverse=True)]


def _read(path: Path) -> TrainingState:
    with safe_open(path, framework="pt") as file:
        told = json.loads(file.metadata()["told"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dictionary
    return TrainingState(num_steps=told["num_steps"], tensors=tensors, told=told)


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under longer names, on the CPU."""
    return {f"{prefix}{name}": tensor.detach().cpu() for name, tensor in tensors.items()}


def of(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those under a prefix, by their names behind it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
