"""Planning a scoring run: what changed since the last one, and everything that can be wrong, before a model does work.

A run is the change from one state of the published tables to the next. Its id is a hash of the state that it starts
from and of everything that decides the result, so that a run that was killed is found again, and one whose result is
shown already is not done again.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import polars as pl
import pyarrow as pa

import data_contracts
from belt_tasks import (
    comparison,
    inventory,
    milestones,
    planning,
    progress,
    publishing,
    refusal,
    score_tables,
    storage,
    telemetry,
)
from belt_tasks import corpus as corpora
from belt_tasks.changes import ChangeCounts
from belt_tasks.comparison import Comparison, Question
from belt_tasks.corpus import ShardRef
from belt_tasks.inventory import Inventories, SourceRef
from belt_tasks.publishing import Manifest, RunRef, TableChange, run_id_of
from belt_tasks.receipts import Counts, FileReceipt, ShardReceipt
from belt_tasks.score_tables import Shown
from belt_tasks.specs import CorpusSpec, ScoreSpec, Spec
from belt_tasks.storage import StoredFile
from belt_tasks.stored import read_json
from belt_tasks.threads import Threads

PLAN_KEY = "plan"  # in the place of a shard's key


class ScorePlan(Spec):
    """A scoring run, ready to start."""

    run: RunRef
    shards: tuple[ShardRef, ...] = ()
    """Those that hold documents to score."""
    spec: ScoreSpec
    """With the checkpoint's chunks and pooling where the caller named none."""
    checkpoint_uri: str
    checkpoint_digest: str
    scoring_fingerprint: str
    """Hash of everything that decides a document's scores, besides the document."""
    labels: tuple[str, ...]
    device: str
    """Its name."""
    base_version: int | None
    """The version of the predictions table that the run is planned on; None where there is no table."""
    manifest: Manifest | None = None
    """Of a run that is complete already: nothing is left but to publish it, if that."""
    counts: ChangeCounts | None = None
    """What changed; None where the run is complete."""
    receipt: ShardReceipt | None = None
    """Of what the plan wrote."""
    change: TableChange | None = None
    """What the run does to the published tables."""
    num_rows: int = 0
    """Rows, good and bad, of the files that the run reads."""
    num_rows_to_score: int = 0

    @property
    def is_last(self) -> bool:
        """Whether the published table is that of the whole corpus after it."""
        return self.change is None or self.change.is_last

    @property
    def refusal(self) -> str | None:
        """Why it is not carried out: too many rows are put aside by the plan alone; None where they are not."""
        counts = Counts() if self.receipt is None else self.receipt.counts
        limit = self.spec.max_rejected_share
        return refusal.refusal(self.run, counts, num_rows=self.num_rows, limit=limit)

    def check_rejected_share(self, of_shards: Sequence[ShardReceipt] = ()) -> None:
        """Refuse to go on where too many rows are put aside.

        Raises:
            RejectedError: there are more, by the plan and in shards, than the spec allows.
        """
        receipts = [*([] if self.receipt is None else [self.receipt]), *of_shards]
        limit = self.spec.max_rejected_share
        refusal.check_rejected_share(self.run, receipts, num_rows=self.num_rows, limit=limit)

    def run_row(self, corpus_uri: str) -> dict[str, str | int | None]:
        """What the run's row of the `runs` table says of this plan."""
        return {
            "flow": "score",
            "corpus_uri": corpus_uri,
            "checkpoint_uri": self.checkpoint_uri,
            "checkpoint_digest": self.checkpoint_digest,
            "scoring_fingerprint": self.scoring_fingerprint,
            "device": self.device,
            "precision": self.spec.precision,
            "spec": self.spec.model_dump_json(),
            "base_run_id": self.change.base_run_id if self.change else None,
            **(self.counts.model_dump() if self.counts else {}),
        }


def plan_scoring(
    corpus_uri: str, checkpoint_uri: str, output_uri: str, corpus: CorpusSpec, spec: ScoreSpec
) -> ScorePlan:
    """Plan the scoring of what is new, changed or gone in a corpus since the run whose tables are shown.

    Raises:
        ConfigError: the corpus, the checkpoint, the output or a parameter is wrong.
        RejectedError: too many rows are broken; nothing was scored.
    """
    planning.check_apart(corpus_uri, output_uri)
    asked = comparison.ask(corpus_uri, checkpoint_uri, corpus, spec)
    output_uri = planning.open_run(output_uri, "", flow="score").output_uri
    shown = score_tables.finish(output_uri)
    base_version = None if shown is None else shown.version
    if shown is not None:
        telemetry.published(output_uri, datetime.fromisoformat(shown.manifest.run["finished_at"]))
    known = None if shown is None else comparison.read_sources(shown)
    comparison.check_evidence(asked, shown, known)
    if shown is not None and known is not None and comparison.is_current(asked, shown, known):
        milestones.up_to_date(shown.run_id, "score")
        return ScorePlan(run=shown.run, manifest=shown.manifest, **_present(asked, base_version))
    run = RunRef(output_uri=output_uri, run_id=_run_id(asked, shown))
    plan = read_plan(run)
    if plan is None:
        plan = _plan_changes(asked, run, shown, known)
        telemetry.rows_rejected(Counts() if plan.receipt is None else plan.receipt.counts)
    else:  # written again, since what has been left for long is cleaned up
        _write_plan(plan)
    found = {"run": run, "manifest": publishing.find_complete(run)}
    plan = plan.model_copy(update=_present(asked, base_version) | found)
    if plan.manifest is None:
        plan.check_rejected_share()
        for stage in ("tokenize", "score"):
            progress.advance(stage, 0, num_more=plan.num_rows_to_score)
        milestones.planned(
            run.run_id, "score", num_shards=len(plan.shards), num_rows=plan.num_rows_to_score, counts=plan.counts
        )
    else:
        milestones.up_to_date(run.run_id, "score")
    return plan


def _plan_changes(asked: Question, run: RunRef, shown: Shown | None, known: list[SourceRef] | None) -> ScorePlan:
    """Find what changed, and write all that the run needs to know of it; the plan itself last."""
    inventories = Inventories(root_uri=storage.join(run.output_uri, "inventory"))
    found = comparison.compare(asked, shown, known, inventories)
    plan = ScorePlan(
        run=run,
        shards=_write_rows(run, asked, found),
        counts=found.changes.counts,
        receipt=_write_rejected(run, found),
        change=_write_state(run, asked, shown, found),
        num_rows=sum(source.num_rows for source in found.now.sources if source.source_uri in found.reread),
        num_rows_to_score=sum(len(rows) for rows in found.changes.rows_to_score.values()),
        **_present(asked, None),
    )
    _write_plan(plan)
    return plan


def _write_plan(plan: ScorePlan) -> None:
    storage.write_bytes(plan.run.plan_uri, plan.model_dump_json(indent=1).encode())


def read_plan(run: RunRef) -> ScorePlan | None:
    """What an earlier attempt at this run planned."""
    return read_json(run.plan_uri, ScorePlan, "a plan") if storage.exists(run.plan_uri) else None


def _present(asked: Question, base_version: int | None) -> dict[str, Any]:
    """What a plan says of the present attempt; another one may be made elsewhere."""
    return {
        "spec": asked.spec,
        "checkpoint_uri": asked.checkpoint_uri,
        "checkpoint_digest": asked.checkpoint_digest,
        "scoring_fingerprint": asked.scoring_fingerprint,
        "labels": asked.labels,
        "device": asked.device,
        "base_version": base_version,
    }


def _run_id(asked: Question, shown: Shown | None) -> str:
    keys = [inventory.key_of(file, asked.corpus) for file in asked.files]
    return run_id_of(
        keys,
        flow="score",
        base_run_id=None if shown is None else shown.run_id,
        scoring_fingerprint=asked.scoring_fingerprint,
        spec=asked.spec.model_dump(include=DECIDING),
    )


DECIDING = {"full", "removed", "publish_every", "evidence", "num_evidence_chunks", "evidence_text"}
"""Fields of a spec that decide what a run does to the tables, besides those of the scoring fingerprint."""


def _write_rejected(run: RunRef, found: Comparison) -> ShardReceipt:
    """Write the rows of new and changed files that are put aside."""
    schema = data_contracts.arrow_schema("rejected")
    path = run.path_of("rejected", PLAN_KEY)
    counts = Counts()
    uris = sorted(found.reread & found.now.by_uri.keys())
    with (
        Threads(inventory.NUM_THREADS) as threads,
        storage.parquet_writer(storage.join(run.output_uri, path), schema) as writer,
    ):
        for uri, rows in zip(uris, threads.map(found.now.rejected, uris), strict=True):
            if len(rows) == 0:
                continue
            frame = rows.with_columns(source_uri=pl.lit(uri), run_id=pl.lit(run.run_id)).select(schema.names)
            table = frame.to_arrow().cast(schema)
            publishing.check(table, "rejected", uri)
            writer.write_table(table)
            reasons = dict(rows.group_by("reason").len().iter_rows())
            counts += Counts(num_rejected=len(rows), rejected_by_reason=reasons)
    file = FileReceipt(table="rejected", path=path, num_rows=counts.num_rejected)
    return ShardReceipt(shard_key=PLAN_KEY, files=(file,), counts=counts, is_shard=False)


def _write_rows(run: RunRef, asked: Question, found: Comparison) -> tuple[ShardRef, ...]:
    """Write which rows of which shards are to be scored."""
    rows_to_score = found.changes.rows_to_score

    def write(file: StoredFile) -> list[ShardRef]:
        shards = corpora.shards_with_rows(file, rows_to_score[file.uri])
        for shard, rows in shards:
            storage.write_parquet(run.rows_uri(shard.key), pa.table({"row_index": pa.array(rows, pa.int64())}))
        return [shard for shard, _ in shards]

    with Threads(inventory.NUM_THREADS) as threads:
        parts = list(threads.map(write, [file for file in asked.files if file.uri in rows_to_score]))
    return tuple(shard for part in parts for shard in part)


def _write_state(run: RunRef, asked: Question, shown: Shown | None, found: Comparison) -> TableChange:
    """Write what the tables will be of, and which rows of theirs go."""
    schema = data_contracts.arrow_schema("sources")
    sources = pa.Table.from_pylist([source.model_dump() for source in found.now.sources], schema=schema)
    publishing.check(sources, "sources", run.run_id)
    storage.write_parquet(run.sources_uri, sources)
    storage.write_parquet(run.duplicates_uri, found.now.duplicates.to_arrow())
    marks = asked.spec.removed == "mark"
    replaces_all = found.before is None or (not marks and found.to_rescore == found.now.by_uri.keys())
    base_run_id = None if shown is None else shown.run_id
    change = TableChange(base_run_id=base_run_id, replaces_all=replaces_all, is_last=found.is_last)
    if replaces_all:
        return change
    removed = found.changes.removed
    paths = {}
    for name, keys in (("removed", removed.alias("doc_id")), ("reread", pl.Series("source_uri", sorted(found.reread)))):
        if len(keys):
            paths[f"{name}_path"] = f"runs/{run.run_id}/{name}.parquet"
            column = keys.to_frame().to_arrow().cast(pa.schema([(keys.name, pa.string())]))
            storage.write_parquet(storage.join(run.output_uri, paths[f"{name}_path"]), column)
    return change.model_copy(update=paths)
