"""Events that automations may act on: what a run found out and a person or another flow should know.

Prefect's server keeps them, and a deployment's trigger names them:

    belt.drift    a scoring run is over a limit of drift; resource belt.output.OUTPUT_URI
"""

from uuid import NAMESPACE_URL, uuid5

from prefect.events import emit_event
from prefect.events.worker import EventsWorker

from belt_tasks.report import ScoreReport

DRIFT = "belt.drift"


def resource_id(output_uri: str) -> str:
    """What the events of an output are about."""
    return f"belt.output.{output_uri}"


def announce_drift(report: ScoreReport) -> None:
    """Emit `belt.drift` for a run.

    At least once: it is emitted before the run's report is said to be there, and every attempt, also that of another
    corpus, first makes the reports that are missing; so it does not matter where between the first commit to a table
    and the report an attempt ended. And once where no attempt ended between the event and the receipt of the report:
    a report that is there is used again, and tells nobody. Where one did, the second event has the id of the first, and
    the server keeps one of them.

    The payload's `data_version` is the same whenever the corpus is, whatever scored it: a retraining that is asked for
    the second time by the same version has nothing to do.

    Args:
        report: of a run that has drifted.
    """
    if report.drift is None:
        raise AssertionError("drift is what a run without a reference cannot have")
    emit_event(
        DRIFT,
        resource={
            "prefect.resource.id": resource_id(report.run.output_uri),
            "prefect.resource.name": report.run.output_uri,
            "prefect.resource.role": "output",
        },
        payload={
            "run_id": report.run.run_id,
            "checkpoint_digest": report.checkpoint_digest,
            "scoring_fingerprint": report.scoring_fingerprint,
            "data_version": report.data_version,
            "verdict": report.verdict,
            "measures": [measure.model_dump() for measure in report.drift.measures],
            "report_uri": report.report_uri,
        },
        id=uuid5(NAMESPACE_URL, f"{DRIFT} {report.run.uri} {report.data_version}"),
    )
    EventsWorker.instance().drain()  # a thread sends it: until then a kill would lose it
