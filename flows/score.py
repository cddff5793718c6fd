"""Score a corpus with a checkpoint and publish the predictions."""

from datetime import UTC, datetime

from prefect import flow, unmapped
from prefect.artifacts import create_markdown_artifact

from belt_tasks import summaries
from belt_tasks.publishing import Manifest
from belt_tasks.specs import CorpusSpec, ScoreSpec
from flows import tasks
from flows.storage_block import use_storage_block


@flow(name="score", flow_run_name="score {corpus_uri}", task_runner=tasks.one_worker)
def score(
    corpus_uri: str,
    checkpoint_uri: str,
    output_uri: str,
    corpus: CorpusSpec = CorpusSpec(),
    spec: ScoreSpec = ScoreSpec(),
    storage_block: str | None = None,
) -> Manifest:
    """Score every document of a corpus; killed and started again, it goes on where it was.

    Args:
        corpus_uri: a Parquet file, a directory of them or a glob; any fsspec URL.
        checkpoint_uri: a checkpoint, the output of a fine-tuning, or a finished Hugging Face sequence classifier.
        output_uri: directory for the run and the published manifest.
        corpus: columns and split.
        spec: how to score; what it leaves out is the checkpoint's own.
        storage_block: a Prefect Secret block with the options of object stores; None takes those of the environment.
    """
    use_storage_block(storage_block)
    started_at = datetime.now(UTC)
    plan = tasks.plan_scoring(corpus_uri, checkpoint_uri, output_uri, corpus, spec)
    manifest = tasks.republish(plan.run)
    if manifest is None:
        receipts = tasks.gather(
            tasks.score_shard.map(
                list(plan.shards),
                unmapped(corpus),
                unmapped(plan.spec),
                run=unmapped(plan.run),
                checkpoint_uri=unmapped(plan.checkpoint_uri),
                checkpoint_digest=unmapped(plan.checkpoint_digest),
                duplicates_uri=unmapped(plan.duplicates_uri),
            )
        )
        manifest = tasks.publish(
            plan.run,
            receipts,
            row=plan.run_row(corpus_uri),
            labels=plan.labels,
            started_at=started_at,
            max_rejected_share=plan.spec.max_rejected_share,
        )
    tasks.publish_tables(plan.run, manifest, base_version=plan.base_version)
    create_markdown_artifact(summaries.run_summary(manifest, asked_at=started_at), key="score-summary")
    return manifest
