"""Score a corpus in this process: plan, every shard, publish. For notebooks; the flow does the same with Prefect."""

from datetime import UTC, datetime

from belt_tasks import planning, publishing, score_tables, shard_scoring
from belt_tasks.publishing import Manifest
from belt_tasks.specs import CorpusSpec, ScoreSpec


def score_corpus(
    corpus_uri: str,
    checkpoint_uri: str,
    output_uri: str,
    corpus: CorpusSpec = CorpusSpec(),  # noqa: B008 - frozen
    spec: ScoreSpec = ScoreSpec(),  # noqa: B008 - frozen
) -> Manifest:
    """Score every document of a corpus and publish the predictions; a run that was interrupted goes on.

    Args:
        corpus_uri: a Parquet file, a directory of them or a glob; any fsspec URL.
        checkpoint_uri: a checkpoint, the output of a fine-tuning, or a finished Hugging Face sequence classifier.
        output_uri: directory for the run and the published manifest.
        corpus: columns and split.
        spec: how to score; what it leaves out is the checkpoint's own.

    Raises:
        ConfigError: the corpus, the checkpoint, the output or a parameter is wrong.
        ShardError: a shard cannot be read; nothing is published.
        RejectedError: too many rows were put aside; nothing is published.
        ConflictError: another run was published meanwhile; this one is complete, and is published when asked for again.
    """
    started_at = datetime.now(UTC)
    plan = planning.plan_scoring(corpus_uri, checkpoint_uri, output_uri, corpus, spec)
    receipts = [
        shard_scoring.score_shard(
            shard,
            corpus,
            plan.spec,
            run=plan.run,
            checkpoint_uri=plan.checkpoint_uri,
            checkpoint_digest=plan.checkpoint_digest,
            duplicates_uri=plan.duplicates_uri,
        )
        for shard in plan.shards
    ]
    row = plan.run_row(corpus_uri)
    manifest = publishing.publish(
        plan.run,
        receipts,
        row=row,
        labels=plan.labels,
        started_at=started_at,
        max_rejected_share=plan.spec.max_rejected_share,
    )
    score_tables.publish_tables(plan.run, manifest, base_version=plan.base_version)
    return manifest
