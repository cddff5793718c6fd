"""Fine-tune an encoder on a labelled corpus and publish the checkpoint."""

from datetime import UTC, datetime

from prefect import flow, unmapped

from belt_tasks import model_summaries, summaries
from belt_tasks.fine_tuning import FineTuningReceipt
from belt_tasks.planning import PreparePlan
from belt_tasks.publishing import Manifest
from belt_tasks.receipts import ShardReceipt
from belt_tasks.specs import CorpusSpec, TrainSpec
from flows import artifacts, run_names, tasks
from flows.attempt import Seconds, attempt


@flow(name="fine-tune", flow_run_name=run_names.of("corpus_uri"), task_runner=tasks.one_worker)
def fine_tune(
    corpus_uri: str,
    encoder: str,
    output_uri: str,
    corpus: CorpusSpec = CorpusSpec(),
    spec: TrainSpec = TrainSpec(),
    storage_block: str | None = None,
    time_limit_s: Seconds | None = None,
) -> tuple[Manifest, FineTuningReceipt]:
    """Fine-tune on every labelled document; a run that is complete already is not done again.

    Args:
        corpus_uri: a Parquet file, a directory of them or a glob; any fsspec URL.
        encoder: local directory or hub name of the encoder to begin with.
        output_uri: directory for the run, its checkpoint and the published manifest; can be scored with.
        corpus: columns and split.
        spec: how to fine-tune.
        storage_block: a Prefect Secret block with the options of object stores; None takes those of the environment.
        time_limit_s: seconds after which it ends, to be taken up again by the next attempt; None is no limit.
    """
    with attempt(storage_block, time_limit_s):
        started_at = datetime.now(UTC)
        plan = tasks.plan_fine_tuning(corpus_uri, encoder, output_uri, corpus, spec)
        manifest = tasks.republish_fine_tuning(plan.run, spec)
        if manifest is None:
            receipts = _prepare(plan.prepare)
            validation_receipts = []
            if spec.validation_split is not None:
                validation_receipts = _prepare(tasks.plan_validation(corpus_uri, plan, receipts, spec))
            trained = tasks.fine_tune_prepared(plan, receipts, spec, validation_receipts)
            manifest = tasks.publish(
                plan.run,
                [*receipts, *validation_receipts],
                row={
                    "flow": "fine-tune",
                    "corpus_uri": corpus_uri,
                    "checkpoint_uri": trained.checkpoint_uri,
                    "checkpoint_digest": trained.checkpoint_digest,
                    "device": plan.device,
                    "precision": spec.precision,
                    "spec": spec.model_dump_json(),
                    **trained.counts(),
                },
                labels=trained.labels,
                started_at=started_at,
            )
            tasks.forget_states(plan.run)
        else:
            trained = tasks.read_fine_tuning_receipt(plan.run)
        artifacts.show(
            "fine-tune-summary",
            summaries.run_summary(manifest, asked_at=started_at) + "\n" + model_summaries.fine_tuning_summary(trained),
        )
        if trained.curves_uri is not None:
            artifacts.show_picture("learning-curves", "loss and learning rate by step", trained.curves_uri)
        return manifest, trained


def _prepare(plan: PreparePlan) -> list[ShardReceipt]:
    return tasks.gather(
        tasks.prepare_shard.map(
            list(plan.shards),
            unmapped(plan.corpus),
            run=unmapped(plan.run),
            encoder=unmapped(plan.encoder),
            label_role=unmapped(plan.label_role),
            duplicates_uri=unmapped(plan.duplicates_uri),
            vocabulary=unmapped(plan.vocabulary),
        )
    )
