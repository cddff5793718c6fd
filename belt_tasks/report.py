"""Report: what a scoring run read, said and cost, and how far that is from the reference, as pages for people.

    OUTPUT/runs/RUN_ID/report/rejected.html    data quality: the rows that were put aside
    OUTPUT/runs/RUN_ID/report/index.html       all else
    OUTPUT/runs/RUN_ID/report/report.json      the receipt, written last

A page is one file that needs nothing else, for a browser or a mail. It shows ids, labels and file names, but no text of
a document unless the run was asked for evidence_text.
"""

from belt_tasks import (
    drift,
    examples,
    pages,
    publishing,
    reference,
    report_contents,
    score_tables,
    statistics,
    storage,
)
from belt_tasks.drift import DriftReport
from belt_tasks.errors import ConfigError
from belt_tasks.publishing import Manifest, RunRef
from belt_tasks.specs import DriftSpec, Spec
from belt_tasks.statistics import RunStatistics


class ReportReceipt(Spec):
    """Where the pages are."""

    report_uri: str
    quality_uri: str


class ScoreReport(Spec):
    """What became of a run's report."""

    run_id: str
    pages: ReportReceipt
    statistics_uri: str
    drift: DriftReport | None
    """None where there is no reference yet."""
    spec: DriftSpec
    reused: bool = False
    """Whether an earlier attempt had made it."""


def score_report(
    run: RunRef,
    manifest: Manifest,
    spec: DriftSpec = DriftSpec(),  # noqa: B008 - frozen
    *,
    again: bool = False,
) -> ScoreReport:
    """Count a complete scoring run, compare it with the reference and write its report, unless that was done.

    An attempt that was killed is taken up at any point. To be called once the run is shown, for the steps of a whole
    scoring in their order; the last of them makes the reference.

    Args:
        run: the run.
        manifest: of it.
        spec: limits of drift.
        again: write the report though it is there, as after the reference has come.

    Raises:
        ConfigError: it is no scoring run, or its files have been cleaned up before it was counted.
    """
    if manifest.run["flow"] != "score":
        raise ConfigError(f"run {run.run_id}: reports are those of score runs, got a {manifest.run['flow']} run")
    earlier = read_report(run)
    if earlier is not None and earlier.spec == spec and not again:
        return earlier.model_copy(update={"reused": True})
    counted = statistics.of_run(run, manifest)
    compared = reference.reference_of(run, manifest, counted)
    found = None if compared is None else drift.drift_of(counted, compared, spec)
    done = ScoreReport(
        run_id=run.run_id,
        pages=write_report(run, manifest, counted, compared, found),
        statistics_uri=statistics.uri_of(run),
        drift=found,
        spec=spec,
    )
    storage.write_bytes(_receipt_uri(run), (done.model_dump_json(indent=1) + "\n").encode())
    return done


def report_again(output_uri: str, run_id: str | None = None) -> ScoreReport:
    """The report of a run, made again where its files are still there, with the limits that it had.

    Args:
        output_uri: of `belt score`.
        run_id: a complete run; None takes the one that is shown.

    Raises:
        ConfigError: there is no such run, or neither its files nor its report are there any more.
    """
    output_uri = storage.absolute(output_uri)
    if run_id is None:
        shown = score_tables.shown(output_uri)
        if shown is None:
            raise ConfigError(f"{output_uri}: nothing was published there by `belt score`")
        run = shown.run
    else:
        run = RunRef(output_uri=output_uri, run_id=run_id)
        if not storage.exists(run.manifest_uri):
            raise ConfigError(
                f"{output_uri}: run must be a complete one of those that `belt runs` lists, got {run_id!r}"
            )
    manifest = publishing.read_run_manifest(run)
    earlier = read_report(run)
    if earlier is not None and publishing.find_complete(run) is None:
        return earlier.model_copy(update={"reused": True})
    return score_report(run, manifest, DriftSpec() if earlier is None else earlier.spec, again=True)


def read_report(run: RunRef) -> ScoreReport | None:
    """The receipt of a run's report; None where there is none."""
    uri = _receipt_uri(run)
    return ScoreReport.model_validate_json(storage.read_bytes(uri)) if storage.exists(uri) else None


def write_report(
    run: RunRef,
    manifest: Manifest,
    counted: RunStatistics,
    compared: RunStatistics | None,
    found: DriftReport | None,
) -> ReportReceipt:
    """Write the pages of a run whose files are there.

    Args:
        run: the run.
        manifest: of it.
        counted: its statistics.
        compared: those of the reference.
        found: how far the two are apart; None where there is no reference.
    """
    receipt = ReportReceipt(report_uri=_page_uri(run, "index"), quality_uri=_page_uri(run, "rejected"))
    rejected = examples.rejected_rows(run, manifest)
    page = pages.render("rejected.html.j2", report_contents.of_quality(manifest, rejected))
    storage.write_bytes(receipt.quality_uri, page)
    contents = report_contents.of_report(
        manifest,
        counted,
        compared,
        found,
        evidence=examples.top_evidence(run, manifest, report_contents.labels_by_count(counted)),
        history=examples.last_runs(run, manifest),
    )
    storage.write_bytes(receipt.report_uri, pages.render("index.html.j2", contents))
    return receipt


def _page_uri(run: RunRef, name: str) -> str:
    return storage.join(run.uri, "report", f"{name}.html")


def _receipt_uri(run: RunRef) -> str:
    return storage.join(run.uri, "report", "report.json")
