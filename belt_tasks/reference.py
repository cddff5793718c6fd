"""The reference: the statistics that runs by the same rules are measured by.

    OUTPUT/statistics/reference-SCORING_FINGERPRINT.json

It is the first whole scoring by a checkpoint and its settings, one run or all steps of it, and is never changed: drift
is slow, and what moves with the documents finds none. To begin anew, remove the file and score with --full.
"""

from functools import reduce
from operator import add

from belt_tasks import publishing, statistics, storage
from belt_tasks.publishing import Manifest, RunRef
from belt_tasks.specs import ScoreSpec
from belt_tasks.statistics import RunStatistics
from belt_tasks.stored import read_json


def uri_of(output_uri: str, scoring_fingerprint: str) -> str:
    """Where the reference of some rules is."""
    return storage.join(output_uri, "statistics", f"reference-{scoring_fingerprint}.json")


def reference_of(run: RunRef, manifest: Manifest, counted: RunStatistics) -> RunStatistics | None:
    """What a run is compared with; where there is none yet and this run ends a whole scoring, it is made.

    Args:
        run: a complete run.
        manifest: of it.
        counted: its statistics.

    Returns:
        None before the first whole scoring has ended, and where files of it were cleaned up before they were counted.
    """
    uri = uri_of(run.output_uri, counted.scoring_fingerprint)
    if not storage.exists(uri):
        steps = whole_scoring(run, manifest)
        if steps is None or not counted.num_documents:
            return None
        parts = [part for part in (statistics.of_run(*step) for step in steps) if part is not None]
        if len(parts) < len(steps):
            return None
        storage.create_bytes(uri, reduce(add, [*parts, counted]).model_dump_json().encode())  # the first one stays
    return read_json(uri, RunStatistics, "statistics")


def whole_scoring(run: RunRef, manifest: Manifest) -> list[tuple[RunRef, Manifest]] | None:
    """The steps before a run with which it scored every document by the same rules; None where it did not."""
    if manifest.change is None or not manifest.change.is_last:
        return None
    steps: list[tuple[RunRef, Manifest]] = []
    while manifest.change is not None and manifest.change.base_run_id is not None:
        if ScoreSpec.model_validate_json(manifest.run["spec"]).full:
            break
        base = RunRef(output_uri=run.output_uri, run_id=manifest.change.base_run_id)
        if not storage.exists(base.manifest_uri):
            return None
        fingerprint, manifest = manifest.run["scoring_fingerprint"], publishing.read_run_manifest(base)
        if manifest.run["scoring_fingerprint"] != fingerprint:
            break
        if manifest.change is None or manifest.change.is_last:
            return None  # the one before was of the whole corpus already: this one scored what has changed since
        steps.insert(0, (base, manifest))
    return steps
