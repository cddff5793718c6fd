"""The runs of an output: which there are, how far each came, what it cost, and which one is shown."""

from datetime import datetime
from typing import Literal

from belt_tasks import export, lake, publishing, storage
from belt_tasks.errors import ConfigError
from belt_tasks.publishing import Manifest, RunRef
from belt_tasks.score_tables import table_at
from belt_tasks.specs import Spec

State = Literal["shown", "complete", "unfinished"]


class RunSummary(Spec):
    """One run; what only a complete run knows is None for others."""

    run_id: str
    state: State
    """shown: what readers see; complete: was shown, or can be; unfinished: killed, failed or under way."""
    num_shards: int
    """That are finished."""
    flow: str | None = None
    started_at: datetime | None = None
    num_documents: int | None = None
    num_rejected: int | None = None
    elapsed_s: float | None = None
    tokens_per_s: float | None = None


class RolledBack(Spec):
    """What readers see again."""

    run_id: str
    from_run_id: str
    version: int
    """Of predictions, which is a new one: the history keeps both runs."""


def list_runs(output_uri: str) -> list[RunSummary]:
    """All runs of an output, the complete ones first, the latest of them at the top.

    Raises:
        ConfigError: there is no run, or the output cannot be read.
    """
    root = storage.join(storage.absolute(output_uri), "runs")
    if not storage.is_directory(root):
        raise ConfigError(f"{output_uri}: no run has written there (no folder runs)")
    num_receipts: dict[str, int] = {}
    complete: list[str] = []
    for file in storage.list_files(root, suffix=".json"):
        run_id, _, rest = file.uri.removeprefix(f"{root}/").partition("/")
        num_receipts[run_id] = num_receipts.get(run_id, 0) + rest.startswith("receipts/")
        if rest == "manifest.json":
            complete.append(run_id)
    shown = _shown_run(output_uri)
    done = [_of_manifest(publishing.read_run_manifest(_run(output_uri, run_id)), shown) for run_id in complete]
    done.sort(key=lambda run: (run.started_at is not None, run.started_at), reverse=True)
    unfinished = sorted(num_receipts.keys() - set(complete))
    return done + [
        RunSummary(run_id=run_id, state="unfinished", num_shards=num_receipts[run_id]) for run_id in unfinished
    ]


def roll_back(output_uri: str, run_id: str | None = None) -> RolledBack:
    """Show an earlier run again, by one commit that changes no history.

    Args:
        output_uri: of `belt score`.
        run_id: the run to show; None is the one that was shown before the present one.

    Raises:
        ConfigError: nothing was published, or no such run was ever shown.
        ConflictError: another run was published at the same moment.
    """
    output_uri = storage.absolute(output_uri)
    predictions = table_at(output_uri, "predictions")
    shown = lake.versions_by_run(predictions)
    if not shown:
        raise ConfigError(f"{output_uri}: nothing was published there")
    now, *before = shown
    names = [run for run in before if run != now]
    wanted = run_id if run_id is not None else next(iter(names), None)
    if wanted is None:
        raise ConfigError(f"{output_uri}: run {now} is the only one that was ever shown")
    if wanted == now:
        raise ConfigError(f"{output_uri}: run {now} is what is shown")
    if wanted not in shown:
        raise ConfigError(f"{output_uri}: run must be one that was shown: {', '.join(names)}; got {wanted!r}")
    version = lake.restore(predictions, shown[wanted], run_id=wanted)
    for name in ("evidence", "rejected"):
        follower = table_at(output_uri, name)
        found = follower.load()  # before predictions are looked at: once they show another run, its tables stay its own
        versions = lake.versions_by_run(follower)
        if wanted in versions and _shown_run(output_uri) == wanted:
            lake.restore(follower, versions[wanted], run_id=wanted, now=found)
    if export.read_export(output_uri) is not None:
        export.export_predictions(output_uri)
    return RolledBack(run_id=wanted, from_run_id=now, version=version)


def _shown_run(output_uri: str) -> str | None:
    if storage.exists(storage.join(output_uri, "published.json")):
        published = publishing.read_manifest(output_uri).run
        if published["flow"] != "score":
            return str(published["run_id"])
    delta = table_at(output_uri, "predictions").load()
    return None if delta is None else lake.shown_run(delta)


def _run(output_uri: str, run_id: str) -> RunRef:
    return RunRef(output_uri=storage.absolute(output_uri), run_id=run_id)


def _of_manifest(manifest: Manifest, shown: str | None) -> RunSummary:
    run = manifest.run
    return RunSummary(
        run_id=run["run_id"],
        state="shown" if run["run_id"] == shown else "complete",
        num_shards=run["num_shards"],
        flow=run["flow"],
        started_at=datetime.fromisoformat(run["started_at"]),
        num_documents=run["num_documents"],
        num_rejected=run["num_rejected"],
        elapsed_s=run["elapsed_s"],
        tokens_per_s=run["tokens_per_s"],
    )
