"""Score a corpus in this process: plan, every shard, publish. For notebooks; the flow does the same with Prefect."""

from collections.abc import Sequence
from datetime import UTC, datetime

import polars as pl
import pyarrow as pa

from belt_tasks import milestones, publishing, score_planning, score_tables, shard_scoring, storage
from belt_tasks.export import export_predictions
from belt_tasks.publishing import Manifest, RunRef
from belt_tasks.receipts import UNSCORED, ShardReceipt, total
from belt_tasks.score_planning import ScorePlan
from belt_tasks.specs import CorpusSpec, ScoreSpec

ONLY_ID = pa.schema([("doc_id", pa.string())])


def score_corpus(
    corpus_uri: str,
    checkpoint_uri: str,
    output_uri: str,
    corpus: CorpusSpec = CorpusSpec(),  # noqa: B008 - frozen
    spec: ScoreSpec = ScoreSpec(),  # noqa: B008 - frozen
) -> Manifest:
    """Score what is new or changed in a corpus and publish it; a run that was interrupted goes on.

    Args:
        corpus_uri: a Parquet file, a directory of them or a glob; any fsspec URL.
        checkpoint_uri: a checkpoint, the output of a fine-tuning, REGISTRY@ALIAS, or a finished Hugging Face sequence
            classifier.
        output_uri: directory for the run and the published tables.
        corpus: columns and split.
        spec: how to score; what it leaves out is the checkpoint's own.

    Returns:
        The manifest of the run that the tables show now: the last one, where nothing had changed.

    Raises:
        ConfigError: the corpus, the checkpoint, the output or a parameter is wrong.
        ShardError: a shard cannot be read; nothing is published.
        RejectedError: too many rows were put aside; nothing is published.
        ConflictError: another run was published meanwhile; nothing of this one is.
    """
    while True:
        started_at = datetime.now(UTC)
        plan = score_planning.plan_scoring(corpus_uri, checkpoint_uri, output_uri, corpus, spec)
        checkpoint_uri = plan.checkpoint_uri  # an alias that moves meanwhile changes nothing
        manifest = plan.manifest
        if manifest is None:
            receipts = score_shards(plan, corpus)
            manifest = complete(plan, receipts, corpus_uri=corpus_uri, started_at=started_at)
        score_tables.publish_tables(plan.run, manifest, base_version=plan.base_version)
        if plan.is_last:
            break
    if spec.export:
        export_predictions(plan.run.output_uri)
    return manifest


def score_shards(plan: ScorePlan, corpus: CorpusSpec) -> list[ShardReceipt]:
    """Score every shard of a plan, one after the other."""
    return [
        shard_scoring.score_shard(
            shard,
            corpus,
            plan.spec,
            run=plan.run,
            checkpoint_uri=plan.checkpoint_uri,
            checkpoint_digest=plan.checkpoint_digest,
            scoring_fingerprint=plan.scoring_fingerprint,
            rows_uri=plan.run.rows_uri(shard.key),
        )
        for shard in plan.shards
    ]


def complete(plan: ScorePlan, receipts: Sequence[ShardReceipt], *, corpus_uri: str, started_at: datetime) -> Manifest:
    """Complete a run whose shards are scored.

    Args:
        plan: of the run.
        receipts: of its shards.
        corpus_uri: as the caller named it.
        started_at: when the run began.

    Raises:
        RejectedError: too many rows were put aside.
    """
    change, planned = plan.change, plan.receipt
    if change is None or planned is None:
        raise AssertionError("a run that is not complete has both")
    if plan.spec.removed == "mark":
        change = change.model_copy(update={"marked_at": datetime.now(UTC).isoformat()})
    milestones.rows_rejected(plan.run.run_id, planned.counts + total(receipts), num_rows=plan.num_rows)
    plan.check_rejected_share(receipts)
    if not change.replaces_all:
        change = change.model_copy(update={"unscored_path": _write_unscored(plan.run, receipts)})
    return publishing.complete(
        plan.run,
        [planned, *receipts],
        row=plan.run_row(corpus_uri),
        labels=plan.labels,
        started_at=started_at,
        change=change,
    )


def _write_unscored(run: RunRef, receipts: Sequence[ShardReceipt]) -> str | None:
    """Write the ids of documents for which the model gave no number; None where there are none."""
    mine = [receipt for receipt in receipts if receipt.counts.rejected_by_reason.get(UNSCORED)]
    uris = [storage.join(run.output_uri, file.path) for each in mine for file in each.files_of("rejected")]
    if not uris:
        return None
    rows = [pl.DataFrame(storage.read_parquet(uri, columns=["doc_id", "reason"])) for uri in uris]
    ids = pl.concat(rows).filter(pl.col("reason") == UNSCORED).select("doc_id").unique().sort("doc_id")
    path = f"runs/{run.run_id}/unscored.parquet"
    storage.write_parquet(storage.join(run.output_uri, path), ids.to_arrow().cast(ONLY_ID))
    return path
