"""Report: what a scoring run read, said and cost, and how far that is from the reference, as pages for people.

    OUTPUT/runs/RUN_ID/report/rejected.html    data quality: the rows that were put aside
    OUTPUT/runs/RUN_ID/report/index.html       all else
    OUTPUT/runs/RUN_ID/report/report.json      the receipt, written last

A page is one file that needs nothing else, for a browser or a mail. It shows ids, labels and file names, but no text of
a document unless the run was asked for evidence_text.
"""

from collections.abc import Callable

from belt_tasks import drift, examples, pages, publishing, reference, report_contents, score_tables, statistics, storage
from belt_tasks.drift import DriftReport
from belt_tasks.errors import ConfigError
from belt_tasks.publishing import Manifest, RunRef
from belt_tasks.specs import DriftSpec, Spec
from belt_tasks.statistics import RunStatistics
from belt_tasks.stored import read_json


class ScoreReport(Spec):
    """What became of a run's report."""

    run: RunRef
    report_uri: str
    """The page."""
    quality_uri: str
    """The page of rejected rows."""
    statistics_uri: str
    checkpoint_digest: str
    scoring_fingerprint: str
    data_version: str
    """Of the corpus that the tables are of after the run: the same files in the same versions have the same."""
    is_reference: bool
    """Whether the run is what others are compared with, or a step of it."""
    drift: DriftReport | None
    """None of what is the reference, and where there is none yet."""
    spec: DriftSpec
    """Limits of drift."""
    is_announced: bool = False
    """Whether drift was told to whoever listens."""

    @property
    def has_drifted(self) -> bool:
        """Whether it is over a limit."""
        return self.drift is not None and self.drift.verdict == "drifted"

    @property
    def verdict(self) -> str:
        """On drift, in a sentence without a full stop."""
        if self.drift is not None:
            return self.drift.words
        return drift.OF_REFERENCE if self.is_reference else drift.WITHOUT_REFERENCE


Announce = Callable[[ScoreReport], None]


def score_report(
    run: RunRef,
    manifest: Manifest,
    spec: DriftSpec = DriftSpec(),  # noqa: B008 - frozen
    *,
    announce: Announce | None = None,
) -> ScoreReport | None:
    """Count a run, compare it with the reference and write its report, unless an earlier attempt did.

    To be called once the run is shown. Where attempts ended after a run was shown and before its report was written,
    and the corpus changed before the next, those before it are done first, so that the reference and every drift are
    found whatever is killed.

    Args:
        run: the run.
        manifest: of it.
        spec: limits of drift; with others than before the report is made again.
        announce: is told once of a run that has drifted, before the receipt says so: where an attempt ends between
            the two, the next one tells again.

    Returns:
        None where the run's files were cleaned up before it had a report, as those of a run that is shown again.

    Raises:
        ConfigError: it is no scoring run.
    """
    if manifest.run["flow"] != "score":
        raise ConfigError(f"run {run.run_id}: reports are those of score runs, got a {manifest.run['flow']} run")
    for earlier, of_earlier in _left_out(run, manifest):
        before = read_report(earlier)
        _report(earlier, of_earlier, spec if before is None else before.spec, announce=announce)
    return _report(run, manifest, spec, announce=announce)


def report_again(output_uri: str, run_id: str | None = None) -> ScoreReport:
    """The report of a run, written again with the limits that it had, where the run's files are still there.

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
        run_id = shown.run_id
    run = RunRef(output_uri=output_uri, run_id=run_id)
    if not storage.exists(run.manifest_uri):
        raise ConfigError(f"{output_uri}: run must be a complete one of those that `belt runs` lists, got {run_id!r}")
    manifest, earlier = publishing.read_run_manifest(run), read_report(run)
    spec = DriftSpec() if earlier is None else earlier.spec
    done = score_report(run, manifest, spec) if earlier is None else _report(run, manifest, spec, again=True)
    if done is None:
        raise ConfigError(f"{run.uri}: has no report, and what it could be made of was cleaned up")
    return done


def read_report(run: RunRef) -> ScoreReport | None:
    """The receipt of a run's report; None where there is none.

    Raises:
        ConfigError: it is none that this belt reads.
    """
    uri = _receipt_uri(run)
    return read_json(uri, ScoreReport, "the receipt of a report") if storage.exists(uri) else None


def _left_out(run: RunRef, manifest: Manifest) -> list[tuple[RunRef, Manifest]]:
    """The runs before one that has no report, the first one first, from the last of them that has one."""
    found: list[tuple[RunRef, Manifest]] = []
    while read_report(run) is None and manifest.change is not None and manifest.change.base_run_id is not None:
        run = RunRef(output_uri=run.output_uri, run_id=manifest.change.base_run_id)
        if not storage.exists(run.manifest_uri):
            break
        manifest = publishing.read_run_manifest(run)
        found.insert(0, (run, manifest))
    return found


def _report(
    run: RunRef, manifest: Manifest, spec: DriftSpec, *, announce: Announce | None = None, again: bool = False
) -> ScoreReport | None:
    """Make what is missing of a run's report."""
    earlier = read_report(run)
    done = earlier if earlier is not None and earlier.spec == spec and not again else _write(run, manifest, spec)
    if done is None:
        return earlier
    if earlier is not None:
        done = done.model_copy(update={"is_announced": earlier.is_announced})
    if announce is not None and done.has_drifted and not done.is_announced:
        announce(done)
        done = done.model_copy(update={"is_announced": True})
    if done != earlier:
        storage.write_bytes(_receipt_uri(run), (done.model_dump_json(indent=1) + "\n").encode())
    return done


def _write(run: RunRef, manifest: Manifest, spec: DriftSpec) -> ScoreReport | None:
    """Write a run's statistics and pages; None where its files were cleaned up."""
    counted = statistics.of_run(run, manifest)
    if counted is None or publishing.find_complete(run) is None:
        return None
    compared = reference.reference_of(run, manifest, counted)
    is_reference = compared is not None and run.run_id in compared.run_ids
    found = None if compared is None or is_reference else drift.drift_of(counted, compared, spec)
    done = ScoreReport(
        run=run,
        report_uri=run.report_uri,
        quality_uri=run.quality_uri,
        statistics_uri=statistics.uri_of(run),
        checkpoint_digest=manifest.run["checkpoint_digest"],
        scoring_fingerprint=counted.scoring_fingerprint,
        data_version=_data_version(run),
        is_reference=is_reference,
        drift=found,
        spec=spec,
    )
    contents = report_contents.of_quality(manifest.run, examples.rejected_rows(run.output_uri, manifest.files))
    storage.write_bytes(done.quality_uri, pages.render("rejected.html.j2", contents))
    storage.write_bytes(done.report_uri, _page(run, manifest, counted, compared, found))
    return done


def _page(
    run: RunRef,
    manifest: Manifest,
    counted: RunStatistics,
    compared: RunStatistics | None,
    found: DriftReport | None,
) -> bytes:
    contents = report_contents.of_report(
        manifest,
        counted,
        compared,
        found,
        evidence=examples.top_evidence(run, manifest, report_contents.labels_by_count(counted)),
        history=examples.last_runs(run, manifest),
    )
    return pages.render("index.html.j2", contents)


def _data_version(run: RunRef) -> str:
    if not storage.exists(run.sources_uri):  # nothing else is known of what the run read
        return run.run_id
    keys = storage.read_parquet(run.sources_uri, columns=["inventory_key"])["inventory_key"].to_pylist()
    return publishing.digest_of(keys=sorted(keys))


def _receipt_uri(run: RunRef) -> str:
    return storage.join(run.uri, "report", "report.json")
