"""Write the chunk table of a corpus."""

from datetime import UTC, datetime

from prefect import flow, unmapped

from belt_tasks import summaries
from belt_tasks.publishing import Manifest
from belt_tasks.specs import ChunkSpec, CorpusSpec
from flows import artifacts, run_names, tasks
from flows.attempt import Seconds, attempt


@flow(name="chunk", flow_run_name=run_names.of("corpus_uri"), task_runner=tasks.one_worker)
def chunk(
    corpus_uri: str,
    encoder: str,
    output_uri: str,
    corpus: CorpusSpec = CorpusSpec(),
    chunks: ChunkSpec = ChunkSpec(),
    storage_block: str | None = None,
    time_limit_s: Seconds | None = None,
) -> Manifest:
    """Cut every document of a corpus into chunks of token ids.

    Args:
        corpus_uri: a Parquet file, a directory of them or a glob; any fsspec URL.
        encoder: local directory or hub name of the encoder whose tokenizer is used.
        output_uri: directory for the run and the published manifest.
        corpus: columns and split.
        chunks: the method's parameters.
        storage_block: a Prefect Secret block with the options of object stores; None takes those of the environment.
        time_limit_s: seconds after which it ends, to be taken up again by the next attempt; None is no limit.
    """
    with attempt(storage_block, time_limit_s):
        started_at = datetime.now(UTC)
        plan = tasks.plan_chunking(corpus_uri, encoder, output_uri, corpus, chunks)
        manifest = tasks.republish(plan.run)
        if manifest is None:
            receipts = tasks.gather(
                tasks.chunk_shard.map(
                    list(plan.shards),
                    unmapped(corpus),
                    unmapped(chunks),
                    run=unmapped(plan.run),
                    encoder=unmapped(plan.encoder),
                    duplicates_uri=unmapped(plan.duplicates_uri),
                )
            )
            row = {"flow": "chunk", "corpus_uri": corpus_uri, "spec": chunks.model_dump_json()}
            manifest = tasks.publish(plan.run, receipts, row=row, labels=(), started_at=started_at)
        artifacts.show("chunk-summary", summaries.run_summary(manifest, asked_at=started_at))
        return manifest
