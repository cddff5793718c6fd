"""Events that automations may act on: what a run found out and a person or another flow should know.

Prefect's server keeps them, and a deployment's trigger names them:

    belt.drift     a scoring run is over a limit of drift; resource belt.output.OUTPUT_URI
    belt.labels    a labelled corpus has changed; resource belt.corpus.CORPUS_URI

An event's id is derived from what it tells, so that the server keeps a repeated event once.
"""

from datetime import UTC, datetime
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import httpx
from prefect.client.orchestration import get_client
from prefect.events import Event
from prefect.runtime import flow_run

from belt_tasks.errors import TransientError
from belt_tasks.report import ScoreReport
from belt_tasks.watch import CorpusVersion

DRIFT = "belt.drift"
LABELS = "belt.labels"


def resource_id(output_uri: str) -> str:
    """What the events of an output are about."""
    return f"belt.output.{output_uri}"


def corpus_resource_id(corpus_uri: str) -> str:
    """What the events of a corpus are about."""
    return f"belt.corpus.{corpus_uri}"


def announce_drift(report: ScoreReport) -> None:
    """Emit `belt.drift` for a run.

    It is told at least once: the event is sent before the receipt of the run's report is written, and every attempt
    first makes the reports that are missing, so it does not matter where an attempt ended. If it ended between the
    event and the receipt, the next attempt sends the event again with the same id, and the server keeps one of the
    two. A report that is there is used again, and tells nobody.

    The payload's `data_version` is the same whenever the corpus is, whatever scored it: a retraining that is asked for
    the second time by the same version has nothing to do.

    Args:
        report: of a run that has drifted.

    Raises:
        TransientError: the server did not take it.
    """
    if report.drift is None:
        raise AssertionError("drift is what a run without a reference cannot have")
    _emit(
        DRIFT,
        resource_id(report.run.output_uri),
        report.run.output_uri,
        role="output",
        told=f"{report.run.uri} {report.data_version}",
        payload={
            "run_id": report.run.run_id,
            "checkpoint_digest": report.checkpoint_digest,
            "scoring_fingerprint": report.scoring_fingerprint,
            "data_version": report.data_version,
            "verdict": report.verdict,
            "measures": [measure.model_dump() for measure in report.drift.measures],
            "report_uri": report.report_uri,
        },
    )


def announce_labels(version: CorpusVersion) -> None:
    """Emit `belt.labels` for a version of a corpus.

    Raises:
        TransientError: the server did not take it.
    """
    _emit(
        LABELS,
        corpus_resource_id(version.corpus_uri),
        version.corpus_uri,
        role="corpus",
        told=f"{version.seen_uri} {version.number} {version.data_version}",
        payload={"data_version": version.data_version, "num_files": version.num_files},
    )


def _emit(event: str, resource: str, name: str, *, role: str, told: str, payload: dict[str, Any]) -> None:
    """Post an event and see that it was taken: Prefect's own way to emit sends it later, and loses it in silence."""
    run_id = flow_run.get_id()
    sent = Event(
        event=event,
        occurred=datetime.now(UTC),
        resource={"prefect.resource.id": resource, "prefect.resource.name": name, "prefect.resource.role": role},
        related=[]
        if run_id is None
        else [{"prefect.resource.id": f"prefect.flow-run.{run_id}", "prefect.resource.role": "flow-run"}],
        payload=payload,
        id=uuid5(NAMESPACE_URL, f"{event} {told}"),
    )
    try:
        with get_client(sync_client=True) as client:
            client.request("POST", "/events", json=[sent.model_dump(mode="json")])
    except httpx.HTTPError as error:
        raise TransientError(f"the Prefect server was not told of {event}: {error or type(error).__name__}") from error
