"""Fine-tuning: prepared shards of a labelled corpus to a checkpoint in the run's folder."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic import Field

from belt_tasks import data_parallel, fitting, learning_curves, object_stores, publishing, storage
from belt_tasks.calibration import Calibration
from belt_tasks.checkpoint import CARD_NAME, CheckpointCard, save_checkpoint
from belt_tasks.data_parallel import Ranks
from belt_tasks.errors import ConfigError
from belt_tasks.fitting import Epoch, Fitted
from belt_tasks.planning import TrainPlan
from belt_tasks.publishing import Manifest, RunRef
from belt_tasks.receipts import ShardReceipt, in_words, total
from belt_tasks.specs import Spec, TaskKind, TrainSpec
from belt_tasks.stored import read_json
from belt_tasks.training_set import TrainingSet, load_training_set, tokens_uris


class FineTuningReceipt(Spec):
    """A finished fine-tuning."""

    checkpoint_uri: str
    checkpoint_digest: str
    labels: tuple[str, ...]
    task: TaskKind
    num_training_documents: int
    num_validation_documents: int
    epochs: tuple[Epoch, ...]
    best_epoch: int
    """The one that was kept: the best on the documents held out; the last without any."""
    patience: int | None = None
    """Epochs without a better one, after which training ended; None where it went on to its last."""
    calibration: Calibration | None = None
    """Of the one that was kept; None where probabilities are left as they are."""
    metrics: dict[str, Any] = Field(default_factory=dict)
    """Those of the checkpoint's card."""
    metrics_uri: str | None = None
    """What every step and epoch measured, as JSON lines."""
    curves_uri: str | None = None
    """Their picture."""
    lonely_labels: tuple[str, ...] = ()
    """Labels that a single training document has."""
    num_chunks: int
    """Chunks of the training and validation documents."""
    num_tokens_scored: int
    num_tokens_encoded: int
    """Content tokens of these chunks."""
    training_s: float
    """Of all attempts, but for work that a crash undid."""
    resumed_from_step: int | None = None
    """The step after which the last attempt took up an earlier one; None if it began anew."""

    def counts(self) -> dict[str, Any]:
        """Columns of the runs contract."""
        return {
            "num_chunks": self.num_chunks,
            "num_tokens_scored": self.num_tokens_scored,
            "encode_s": self.training_s,
            "tokens_per_s": self.num_tokens_encoded * len(self.epochs) / self.training_s,
        }


def fine_tune(
    training_set: TrainingSet,
    spec: TrainSpec,
    *,
    encoder_source: str,
    checkpoint_uri: str,
    ranks: Ranks,
    run: RunRef | None = None,
) -> FineTuningReceipt:
    """Fine-tune an encoder on labelled documents, and write the best epoch.

    Args:
        training_set: labelled documents.
        spec: how.
        encoder_source: local directory or hub name of the encoder to begin with.
        checkpoint_uri: directory to write.
        ranks: the processes that share the work; the others call `fit` with the same arguments.
        run: in whose folder states and measurements are kept; None keeps none.

    Raises:
        ConfigError: the encoder cannot be loaded or read such chunks, the documents do not fit the spec, or the loss
            stops being a number.
    """

    def keep(fitted: Fitted) -> str:
        where = f"{checkpoint_uri}-before-divergence"
        _save(fitted, encoder_source=encoder_source, checkpoint_uri=where)
        return where

    fitted = fitting.fit(training_set, spec, encoder_source=encoder_source, ranks=ranks, run=run, keep=keep)
    card = _save(fitted, encoder_source=encoder_source, checkpoint_uri=checkpoint_uri)
    windows = fitted.trainer.windows
    return FineTuningReceipt(
        checkpoint_uri=checkpoint_uri,
        checkpoint_digest=card.digest,
        labels=training_set.head.labels,
        task=training_set.head.task,
        num_training_documents=fitted.num_training_documents,
        num_validation_documents=fitted.num_validation_documents,
        epochs=tuple(fitted.epochs),
        best_epoch=fitted.best + 1,
        patience=spec.early_stopping_patience if len(fitted.epochs) < spec.epochs else None,
        calibration=card.calibration,
        metrics=card.metrics,
        lonely_labels=fitted.lonely_labels,
        num_chunks=windows.num_chunks,
        num_tokens_scored=int(windows.new_tokens_C().sum()),
        num_tokens_encoded=int((windows.stop_C - windows.start_C).sum()),
        training_s=fitted.training_s,
        resumed_from_step=fitted.resumed_from_step,
    )


@contextmanager
def load(
    plan: TrainPlan,
    receipts: Sequence[ShardReceipt],
    validation_receipts: Sequence[ShardReceipt] = (),
    *,
    tokens_path: str | None = None,
) -> Iterator[tuple[TrainingSet, str | None]]:
    """The training set of a run's prepared shards; see `load_training_set`.

    Raises:
        ConfigError: all rows were rejected, or the labels do not make a task.
    """
    output_uri = plan.run.output_uri
    counts = total(receipts)
    if counts.num_documents == 0:
        where = storage.join(plan.prepare.run.uri, "rejected")
        raise ConfigError(
            f"no document is left to train on: all {counts.num_rejected:,} rows were rejected "
            f"({in_words(counts.rejected_by_reason)}); they are listed in {where}"
        )
    with load_training_set(
        tokens_uris(output_uri, receipts),
        task=plan.task,
        target_name=plan.prepare.corpus.label_column,
        label_role=plan.prepare.label_role,
        validation_uris=tokens_uris(output_uri, validation_receipts),
        tokens_path=tokens_path,
    ) as loaded:
        yield loaded


def fine_tune_prepared(
    plan: TrainPlan,
    receipts: Sequence[ShardReceipt],
    spec: TrainSpec,
    validation_receipts: Sequence[ShardReceipt] = (),
) -> FineTuningReceipt:
    """Fine-tune on prepared shards, into the run's folder; goes on where an earlier attempt was killed.

    States stay until `fitting.forget`, for whoever comes after a crash before the run is published.

    Args:
        plan: the run.
        receipts: of its prepared shards.
        spec: how.
        validation_receipts: of the prepared shards of a validation split.

    Raises:
        ConfigError: see `load_training_set`, `fine_tune` and `data_parallel.ranks`.
        TransientError: one of several processes was killed.
    """
    with load(plan, receipts, validation_receipts) as (training_set, tokens_path):
        job = {
            "plan": plan.model_dump(mode="json"),
            "receipts": [receipt.model_dump(mode="json") for receipt in receipts],
            "validation_receipts": [receipt.model_dump(mode="json") for receipt in validation_receipts],
            "spec": spec.model_dump(mode="json"),
            "storage": object_stores.configured(),
            "tokens": tokens_path,
        }
        with data_parallel.ranks(spec, job) as ranks:
            receipt = fine_tune(
                training_set,
                spec,
                encoder_source=plan.encoder,
                checkpoint_uri=storage.join(plan.run.uri, "checkpoint"),
                ranks=ranks,
                run=plan.run,
            )
    curves_uri = storage.join(plan.run.uri, "learning_curves.png")
    metrics_uri = fitting.metrics_uri(plan.run)
    storage.write_bytes(curves_uri, learning_curves.learning_curves_png(fitting.read_metrics(plan.run)))
    receipt = receipt.model_copy(update={"metrics_uri": metrics_uri, "curves_uri": curves_uri})
    storage.write_bytes(_receipt_uri(plan.run), receipt.model_dump_json(indent=1).encode())
    return receipt


def republish(run: RunRef, spec: TrainSpec) -> Manifest | None:
    """As `publishing.republish`; one that lacks checkpoint or receipt is not complete, one that is needs no states."""
    kept = (storage.join(run.uri, "checkpoint", CARD_NAME), _receipt_uri(run))
    manifest = publishing.republish(run) if all(storage.exists(uri) for uri in kept) else None
    if manifest is not None:
        data_parallel.dismiss(spec)
        fitting.forget(run)
    return manifest


def read_receipt(run: RunRef) -> FineTuningReceipt:
    """The receipt of a finished fine-tuning run."""
    return read_json(_receipt_uri(run), FineTuningReceipt, "the receipt of a fine-tuning")


def _save(fitted: Fitted, *, encoder_source: str, checkpoint_uri: str) -> CheckpointCard:
    trainer = fitted.trainer
    return save_checkpoint(
        trainer.model,
        checkpoint_uri,
        tokenizer_source=encoder_source,
        head=trainer.training_set.head,
        chunks=trainer.spec.chunks,
        pooling=trainer.spec.pooling,
        data_fingerprint=trainer.training_set.fingerprint,
        metrics=fitted.metrics,
        training=trainer.spec.model_dump(),
        calibration=fitted.calibration,
    )


def _receipt_uri(run: RunRef) -> str:
    return storage.join(run.uri, "fine_tuning.json")
