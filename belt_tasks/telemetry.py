"""Telemetry: what runs of this process did, as Prometheus metrics, where a site asks for them.

    BELT_METRICS_TEXTFILE      a file for node_exporter's textfile collector, written after every shard and at the end
    BELT_METRICS_PUSHGATEWAY   the address of a Pushgateway, told after every publishing and at the end
    BELT_METRICS_PORT          a port to be scraped at while the process runs, on BELT_METRICS_HOST (127.0.0.1)

The first two suit batches, which are gone when somebody comes to scrape. Where none is set, nothing is imported and
nothing happens. A meter that cannot be told is a warning: no run fails for it.
"""

import atexit
import functools
import http.client
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec

import pydantic
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from belt_tasks.errors import ConfigError
from belt_tasks.receipts import Counts

if TYPE_CHECKING:
    from wsgiref.simple_server import WSGIServer

    from prometheus_client import CollectorRegistry

Outcome = Literal["finished", "reused", "failed"]
Call = tuple[str, tuple[Any, ...], dict[str, Any]]
"""Name and arguments of a function of this module."""
P = ParamSpec("P")

JOB = "belt"
PREFIX = "BELT_METRICS_"
PUSH_S = 10.0
SHARD_BUCKETS_S = (1, 5, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, float("inf"))

log = logging.getLogger(__name__)


class TelemetrySettings(BaseSettings):
    """Where metrics go; each is read from the environment, as BELT_METRICS_PORT and so on."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, extra="ignore", frozen=True, use_attribute_docstrings=True
    )

    textfile: Path | None = None
    """A file that ends in .prom, in node_exporter's folder; one for each job that runs on the machine."""
    pushgateway: str | None = Field(default=None, pattern="^https?://")
    """The address of a Pushgateway."""
    instance: str | None = None
    """What the Pushgateway knows this job's metrics by, beside `job="belt"`."""
    port: int | None = Field(default=None, ge=1, le=65_535)
    """A port to be scraped at."""
    host: str = "127.0.0.1"
    """Where that port is open; it asks nobody who they are."""

    @property
    def is_wanted(self) -> bool:
        """Whether anybody is to be told."""
        return (self.textfile, self.pushgateway, self.port) != (None, None, None)


def read_settings() -> TelemetrySettings:
    """What the environment says.

    Raises:
        ConfigError: a variable is wrong.
    """
    try:
        return TelemetrySettings()
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = "_".join(str(part) for part in first["loc"]).upper()
        got = "" if name == "PUSHGATEWAY" else f", got {first['input']!r}"  # which may hold a password
        raise ConfigError(f"{PREFIX}{name}: {first['msg']}{got}") from None


def start() -> None:
    """Begin to tell, where the environment asks for it; done again, nothing happens.

    Raises:
        ConfigError: a variable is wrong, or prometheus_client is not installed.
    """
    _meters()


_sinks: list[Callable[[Call], None]] = []


@contextmanager
def relayed(sink: Callable[[Call], None]) -> Iterator[None]:
    """Within the block this process has no meters: what they would be told goes to `sink`, for `tell` elsewhere."""
    _sinks.append(sink)
    try:
        yield
    finally:
        _sinks.remove(sink)


def tell(call: Call) -> None:
    """Tell this process's meters what another process relayed."""
    name, arguments, named = call
    RELAYED[name](*arguments, **named)


def _to_meters(function: Callable[P, None]) -> Callable[P, None]:
    @functools.wraps(function)
    def told(*args: P.args, **kwargs: P.kwargs) -> None:
        if _sinks:
            _sinks[-1]((function.__name__, args, kwargs))
        else:
            function(*args, **kwargs)

    return told


@_to_meters
def shard_ended(stage: str, outcome: Outcome, counts: Counts | None = None, *, seconds: float | None = None) -> None:
    """A shard is done with.

    Args:
        stage: score, chunk or prepare.
        outcome: finished, reused (by an earlier attempt) or failed.
        counts: of a finished one.
        seconds: that it took, by the clock.
    """
    meters = _meters()
    if meters is None:
        return
    meters.shards.labels(stage, outcome).inc()
    if counts is not None and seconds is not None:
        meters.documents.labels(stage).inc(counts.num_documents)
        meters.tokens.labels(stage).inc(counts.num_tokens)
        meters.chunks.labels(stage).inc(counts.num_chunks)
        meters.seconds.labels(stage).observe(seconds)
        meters.tokens_per_s.labels(stage).set(counts.num_tokens / seconds)
        meters.count_rejected(counts)
    meters.write()


@_to_meters
def rows_rejected(counts: Counts) -> None:
    """Rows were put aside before there were shards."""
    meters = _meters()
    if meters is not None:
        meters.count_rejected(counts)


@_to_meters
def tried_again() -> None:
    """Something is tried again."""
    meters = _meters()
    if meters is not None:
        meters.retries.inc()


@_to_meters
def published(output_uri: str, at: datetime) -> None:
    """Readers of an output saw its newest run at that time."""
    meters = _meters()
    if meters is not None:
        meters.last_published.labels(output_uri).set(at.timestamp())
        meters.write()
        meters.push()


RELAYED = {function.__name__: function for function in (shard_ended, rows_rejected, tried_again, published)}


class Meters:
    """The metrics of this process, and where they go."""

    def __init__(self, settings: TelemetrySettings) -> None:
        try:
            import prometheus_client as prometheus  # noqa: PLC0415 - optional
        except ImportError as error:
            raise ConfigError("metrics need prometheus_client: pip install 'belt[metrics]'") from error
        self.settings = settings
        self.registry: CollectorRegistry = prometheus.CollectorRegistry()
        self._prometheus = prometheus
        self._writing = threading.Lock()
        self._server: WSGIServer | None = None
        self._thread: threading.Thread | None = None
        here = self.registry
        self.documents = prometheus.Counter("belt_documents", "Documents done.", ["stage"], registry=here)
        self.tokens = prometheus.Counter("belt_tokens", "Content tokens of documents done.", ["stage"], registry=here)
        self.chunks = prometheus.Counter("belt_chunks", "Chunks of documents done.", ["stage"], registry=here)
        self.rejected = prometheus.Counter("belt_rejected_rows", "Rows put aside.", ["reason"], registry=here)
        self.shards = prometheus.Counter("belt_shards", "Shards done with.", ["stage", "outcome"], registry=here)
        self.retries = prometheus.Counter("belt_retries", "Calls that were tried again.", registry=here)
        self.seconds = prometheus.Histogram(
            "belt_shard_seconds", "Seconds that a shard took.", ["stage"], buckets=SHARD_BUCKETS_S, registry=here
        )
        self.tokens_per_s = prometheus.Gauge("belt_tokens_per_second", "Of the last shard.", ["stage"], registry=here)
        self.last_published = prometheus.Gauge(
            "belt_last_published_timestamp_seconds",
            "When readers of an output were last seen to have its newest run.",
            ["output"],
            registry=here,
        )
        if settings.port is not None:
            with _no_run_fails(f"listen at {settings.host}:{settings.port}"):
                self._server, self._thread = prometheus.start_http_server(
                    settings.port, settings.host, registry=self.registry
                )

    def count_rejected(self, counts: Counts) -> None:
        """Rows that were put aside, by their reasons."""
        for reason, number in counts.rejected_by_reason.items():
            self.rejected.labels(reason).inc(number)

    def write(self) -> None:
        """Put the file in place, whole."""
        if self.settings.textfile is not None:
            with self._writing, _no_run_fails(f"write {self.settings.textfile}"):
                self._prometheus.write_to_textfile(str(self.settings.textfile), self.registry)

    def push(self) -> None:
        """Tell the Pushgateway."""
        if self.settings.pushgateway is not None:
            instance = self.settings.instance
            with _no_run_fails("tell the Pushgateway"):
                self._prometheus.pushadd_to_gateway(
                    self.settings.pushgateway,
                    JOB,
                    self.registry,
                    grouping_key=None if instance is None else {"instance": instance},
                    timeout=PUSH_S,
                )

    def close(self) -> None:
        """Tell for the last time."""
        self.write()
        self.push()
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()


@contextmanager
def _no_run_fails(action: str) -> Iterator[None]:
    """What goes wrong in the block is a warning; addresses, which may hold a password, are not in it."""
    try:
        yield
    except (OSError, ValueError, http.client.HTTPException) as error:
        log.warning("metrics: cannot %s: %s", action, getattr(error, "strerror", None) or type(error).__name__)


@functools.cache
def _meters_of(process: int) -> Meters | None:  # noqa: ARG001 - a forked process has its own
    settings = read_settings()
    if not settings.is_wanted:
        return None
    meters = Meters(settings)
    atexit.register(meters.close)
    return meters


def _meters() -> Meters | None:
    return _meters_of(os.getpid())
