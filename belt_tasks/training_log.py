"""The training log: what every step and epoch of a fine-tuning measured, as JSON lines, and in MLflow where configured.

Lines are kept in memory and put when asked, since object stores cannot append. MLflow is used where the environment
names a server (MLFLOW_TRACKING_URI); one that does not answer is told of once and never stops a fine-tuning.
"""

import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Protocol

from belt_tasks import storage
from belt_tasks.errors import ConfigError, without_credentials

log = logging.getLogger(__name__)

MOST_METRICS = 1000  # that MLflow takes at once
MOST_CHARS = 500  # of a parameter
TIMES = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}


class Tracker(Protocol):
    """Who else wants to know what was measured."""

    def log(self, lines: list[dict[str, Any]]) -> None:
        """Take lines, each with its `step`."""

    def end(self, status: str) -> None:
        """No more will come: FINISHED, FAILED or KILLED."""


@dataclass
class TrainingLog:
    """Lines of one fine-tuning: `kind` step or epoch, `step`, and what was measured."""

    uri: str | None = None
    """Of the file; None keeps none."""
    lines: list[str] = field(default_factory=list)
    tracker: Tracker | None = None
    num_sent: int = 0

    def take_up(self, num_lines: int) -> None:
        """Go on behind the first lines of the file that an earlier attempt put."""
        if self.uri is not None and num_lines and storage.exists(self.uri):
            self.lines = storage.read_bytes(self.uri).decode().splitlines()[:num_lines]
            self.num_sent = len(self.lines)

    def add(self, kind: str, step: int, **measured: Any) -> None:  # noqa: ANN401 - numbers, and dictionaries of them
        """Append a line; what is not a finite number goes as null."""
        self.lines.append(json.dumps({"kind": kind, "step": step, **_finite(measured)}, allow_nan=False))

    def put(self) -> None:
        """Write the file, and hand over what is new."""
        if self.uri is not None:
            storage.write_bytes(self.uri, "".join(f"{line}\n" for line in self.lines).encode())
        if self.tracker is not None:
            self.tracker.log([json.loads(line) for line in self.lines[self.num_sent :]])
        self.num_sent = len(self.lines)

    def end(self, status: str) -> None:
        """Nothing more will be measured."""
        if self.tracker is not None:
            self.tracker.end(status)


def mlflow_tracker(run_name: str, parameters: Mapping[str, Any], run_id: str | None = None) -> "MLflowTracker | None":
    """A run of MLflow, where the environment names a server and it answers.

    Args:
        run_name: of a new one.
        parameters: of a new one; nested ones get dotted names.
        run_id: of one to take up.

    Raises:
        ConfigError: a server is named, but mlflow is not installed.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return None
    if find_spec("mlflow") is None:
        raise ConfigError(
            "MLFLOW_TRACKING_URI is set, but mlflow is not installed: install belt's extra mlflow, or unset it"
        )
    for name, value in TIMES.items():
        os.environ.setdefault(name, value)
    try:
        return MLflowTracker(run_name, parameters, run_id)
    except Exception as error:  # noqa: BLE001 - whatever keeps it from answering
        _complain(error)
        return None


class MLflowTracker:
    """A run of MLflow."""

    def __init__(self, run_name: str, parameters: Mapping[str, Any], run_id: str | None) -> None:
        from mlflow import MlflowClient  # noqa: PLC0415 - optional, and takes a second

        self._client = MlflowClient()
        self._is_silent = False
        if run_id is not None:
            self._client.update_run(run_id, status="RUNNING")
            self.run_id = run_id
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "belt")
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        self.run_id = str(self._client.create_run(experiment_id, run_name=run_name).info.run_id)
        for key, value in _flat(parameters).items():
            self._client.log_param(self.run_id, key, str(value)[:MOST_CHARS])

    def log(self, lines: list[dict[str, Any]]) -> None:
        """Send every number of the lines as a metric of its step."""
        from mlflow.entities import Metric  # noqa: PLC0415 - optional

        now = int(time.time() * 1000)
        metrics = [
            Metric(f"{line['kind']}/{key}", float(value), now, line["step"])
            for line in lines
            for key, value in _flat(line).items()
            if key not in ("kind", "step") and isinstance(value, int | float)
        ]
        for first in range(0, len(metrics), MOST_METRICS):
            self._try(self._client.log_batch, self.run_id, metrics=metrics[first : first + MOST_METRICS])

    def end(self, status: str) -> None:
        """The run is over."""
        self._try(self._client.set_terminated, self.run_id, status=status)

    def _try(self, call: Any, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - the client's
        if self._is_silent:
            return
        try:
            call(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - measurements elsewhere are no reason to lose a fine-tuning
            self._is_silent = True
            _complain(error)


def _complain(error: Exception) -> None:
    words = without_credentials(f"{type(error).__name__}: {error}")[:MOST_CHARS]
    log.warning("MLflow does not take this fine-tuning's metrics, which are in its JSON lines: %s", words)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _finite(value: Any) -> Any:  # noqa: ANN401 - JSON
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
