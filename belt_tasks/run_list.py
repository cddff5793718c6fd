"""The runs of an output: which there are, how far each came, what it cost, and which one is shown."""

from datetime import datetime
from typing import Literal

from belt_tasks import delta_tables, export, publishing, score_planning, score_tables, storage
from belt_tasks.errors import ConfigError
from belt_tasks.publishing import Manifest, RunRef
from belt_tasks.score_tables import table_at
from belt_tasks.specs import Spec

State = Literal["shown", "complete", "unfinished", "refused"]


class RunSummary(Spec):
    """One run; what only a complete run knows is None for others."""

    run_id: str
    state: State
    """shown: what readers see; complete: was shown, or can be; unfinished: killed, failed or under way; refused: not
    scored, since too many rows are put aside."""
    reason: str | None = None
    """Why it was refused."""
    is_step: bool = False
    """Whether the tables are not those of the whole corpus after it."""
    num_shards: int
    """That are finished."""
    num_shards_planned: int | None = None
    """Of a scoring run."""
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
    return done + [_unfinished(_run(output_uri, run_id), num_receipts[run_id]) for run_id in unfinished]


def earlier_steps(manifest: Manifest) -> list[Manifest]:
    """The runs before this one since the tables were last those of a whole corpus, the first one first.

    They are the steps in which a night was published; those whose manifests are gone are left out.
    """
    steps: list[Manifest] = []
    while manifest.change is not None and manifest.change.base_run_id is not None:
        base = _run(manifest.run["output_uri"], manifest.change.base_run_id)
        if not storage.exists(base.manifest_uri):
            break
        manifest = publishing.read_run_manifest(base)
        if manifest.change is None or manifest.change.is_last:
            break
        steps.insert(0, manifest)
    return steps


def roll_back(output_uri: str, run_id: str | None = None) -> RolledBack:
    """Show an earlier run again, by one commit that changes no history.

    Where an earlier rollback to the present run was ended between the tables, it is completed instead, unless another
    run is asked for.

    Args:
        output_uri: of `belt score`.
        run_id: the run to show; None is the one that was shown before the present one.

    Raises:
        ConfigError: nothing was published, or no such run was ever shown.
        ConflictError: another run was published at the same moment.
    """
    output_uri = storage.absolute(output_uri)
    predictions = table_at(output_uri, "predictions")
    shown = delta_tables.versions_by_run(predictions)
    if not shown:
        raise ConfigError(f"{output_uri}: nothing was published there")
    now, *before = shown
    late = score_tables.follow_back(_run(output_uri, now)) if run_id in (None, now) else None
    if late is not None:
        _export_again(output_uri)
        return RolledBack(run_id=now, from_run_id=late, version=shown[now])
    names = [run for run in before if run != now]
    wanted = run_id if run_id is not None else next(iter(names), None)
    if wanted is None:
        raise ConfigError(f"{output_uri}: run {now} is the only one that was ever shown")
    if wanted == now:
        raise ConfigError(f"{output_uri}: run {now} is what is shown")
    if wanted not in shown:
        raise ConfigError(f"{output_uri}: run must be one that was shown: {', '.join(names)}; got {wanted!r}")
    version = delta_tables.restore(predictions, shown[wanted], run_id=wanted)
    score_tables.follow_back(_run(output_uri, wanted))
    _export_again(output_uri)
    return RolledBack(run_id=wanted, from_run_id=now, version=version)


def _export_again(output_uri: str) -> None:
    """Where there is an export."""
    if export.read_export(output_uri) is not None:
        export.export_predictions(output_uri)


def _shown_run(output_uri: str) -> str | None:
    if storage.exists(storage.join(output_uri, "published.json")):
        published = publishing.read_manifest(output_uri).run
        if published["flow"] != "score":
            return str(published["run_id"])
    delta = table_at(output_uri, "predictions").load()
    return None if delta is None else delta_tables.shown_run(delta)


def _run(output_uri: str, run_id: str) -> RunRef:
    return RunRef(output_uri=storage.absolute(output_uri), run_id=run_id)


def _unfinished(run: RunRef, num_shards: int) -> RunSummary:
    """What a run without a manifest has come to; only scoring runs write a plan."""
    plan = score_planning.read_plan(run)
    if plan is None:
        return RunSummary(run_id=run.run_id, state="unfinished", num_shards=num_shards)
    reason = None if num_shards else plan.refusal
    return RunSummary(
        run_id=run.run_id,
        state="unfinished" if reason is None else "refused",
        reason=reason,
        is_step=not plan.is_last,
        num_shards=num_shards,
        num_shards_planned=len(plan.shards),
        flow="score",
        num_rejected=None if plan.receipt is None else plan.receipt.counts.num_rejected,
    )


def _of_manifest(manifest: Manifest, shown: str | None) -> RunSummary:
    run = manifest.run
    return RunSummary(
        run_id=run["run_id"],
        state="shown" if run["run_id"] == shown else "complete",
        is_step=manifest.change is not None and not manifest.change.is_last,
        num_shards=run["num_shards"],
        flow=run["flow"],
        started_at=datetime.fromisoformat(run["started_at"]),
        num_documents=run["num_documents"],
        num_rejected=run["num_rejected"],
        elapsed_s=run["elapsed_s"],
        tokens_per_s=run["tokens_per_s"],
    )
