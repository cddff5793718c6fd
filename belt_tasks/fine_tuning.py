"""Fine-tuning: labelled tokens to a checkpoint. The gradient flows through the pooling, exactly, in fixed memory."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from belt_tasks import (
    calibration,
    data_parallel,
    encoder,
    gradient,
    heads,
    metrics,
    object_stores,
    progress,
    publishing,
    scoring,
    storage,
)
from belt_tasks.batches import MiniBatch, collate, plan_batches
from belt_tasks.calibration import Calibration
from belt_tasks.checkpoint import CARD_NAME, CheckpointCard, save_checkpoint
from belt_tasks.data_parallel import ALONE, Ranks
from belt_tasks.encoder import ChunkModel
from belt_tasks.engine import build_encoder
from belt_tasks.errors import ConfigError
from belt_tasks.planning import TrainPlan
from belt_tasks.publishing import Manifest, RunRef
from belt_tasks.receipts import ShardReceipt, Stopwatch
from belt_tasks.specs import CorpusSpec, Spec, TaskKind, TrainSpec
from belt_tasks.stored import read_json
from belt_tasks.tokens import SpecialTokens, load_tokenizer
from belt_tasks.training_set import TrainingSet, load_training_set
from belt_tasks.windows import Windows, chunk_windows

Int64 = npt.NDArray[np.int64]

BATCH_TOKENS = 8192  # of a forward with a graph, where the spec names none


class Epoch(Spec):
    """One pass over the training documents."""

    number: int
    """From 1."""
    training_loss: float
    """Mean over documents, while the weights moved."""
    validation: dict[str, Any] | None
    """Loss and metrics on the held-out documents after the epoch, not calibrated; None without any."""


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
    """The one that was kept: least validation loss; the last without validation documents."""
    calibration: Calibration | None = None
    """Of the one that was kept; None where probabilities are left as they are."""
    metrics: dict[str, Any] = Field(default_factory=dict)
    """Those of the checkpoint's card."""
    num_chunks: int
    """Chunks of the training and validation documents."""
    num_tokens_scored: int
    num_tokens_encoded: int
    """Content tokens of these chunks."""
    training_s: float

    def counts(self) -> dict[str, Any]:
        """Columns of the runs contract."""
        return {
            "num_chunks": self.num_chunks,
            "num_tokens_scored": self.num_tokens_scored,
            "encode_s": self.training_s,
            "tokens_per_s": self.num_tokens_encoded * len(self.epochs) / self.training_s,
        }


@dataclass(kw_only=True)
class Trainer:
    """Everything that one fine-tuning holds while it runs."""

    model: ChunkModel
    training_set: TrainingSet
    windows: Windows
    special: SpecialTokens
    spec: TrainSpec
    device: torch.device
    ranks: Ranks = ALONE

    def batch_loss(self, documents: Int64, *, weight: float, scale: Callable[[Tensor], Tensor]) -> float:
        """Add the gradient of `weight` x the mean loss of some documents to the weights; returns their mean loss.

        The gradient is that of this rank's share of them.
        """
        mine = self.ranks.share(documents)
        share = len(mine) / len(documents)
        loss = self._share_loss(mine, weight=weight * share, scale=scale) if len(mine) else 0.0
        return self.ranks.sum(loss * share)

    def _share_loss(self, documents: Int64, *, weight: float, scale: Callable[[Tensor], Tensor]) -> float:
        windows = self.windows.of_documents(documents)
        target = self._target(documents)

        def loss_of_outputs(outputs_CK: Tensor) -> Tensor:
            pooled_DL = scoring.pool_windows(outputs_CK, windows, spec=self.spec.pooling, head=self.training_set.head)
            return scale(weight * heads.loss(pooled_DL, target, self.training_set.head))

        scaled = gradient.accumulate_gradient(
            self._forward, self._mini_batches(documents, windows), loss_of_outputs, device=self.device
        )
        return scaled / (weight * scale(torch.ones((), device=self.device)).item())

    def evaluate(self, documents: Int64) -> tuple[Tensor, dict[str, Any]]:
        """Pooled logits [D, L] of some documents, in eval mode and on the CPU; their loss and metrics."""
        head = self.training_set.head
        mine = self.ranks.share(documents)
        logits = self._logits(mine) if len(mine) else torch.zeros(0, head.num_logits)
        logits_DL = self.ranks.gather(logits, num_rows=len(documents))
        return logits_DL, self.measure(logits_DL, documents)

    def measure(self, logits_DL: Tensor, documents: Int64, calibrated_by: Calibration | None = None) -> dict[str, Any]:
        """Loss and metrics of pooled logits of some documents."""
        head, target = self.training_set.head, self.training_set.target[documents]
        logits_DL = calibration.calibrated(logits_DL, calibrated_by)
        loss = heads.loss(logits_DL, torch.from_numpy(target), head).item()
        scores_DL = heads.scores(logits_DL.double(), head).numpy()
        return {"loss": loss, **metrics.task_metrics(head.task, target, scores_DL, head.labels)}

    def calibrate(self, logits_DL: Tensor, documents: Int64) -> tuple[Calibration | None, dict[str, Any]]:
        """The calibration of pooled logits of documents held out, and their metrics with it.

        Where there is one, `uncalibrated` among the metrics has the loss and the calibration error without it.
        """
        target, head = self.training_set.target[documents], self.training_set.head
        found = None if self.spec.calibration == "none" else calibration.fit(logits_DL.double().numpy(), target, head)
        before, after = self.measure(logits_DL, documents), self.measure(logits_DL, documents, found)
        if found is None:
            return None, before
        return found, after | {"uncalibrated": {name: before[name] for name in ("loss", "log_loss", "ece")}}

    def _logits(self, documents: Int64) -> Tensor:
        """Pooled logits [D, L] of documents, on the CPU."""
        windows = self.windows.of_documents(documents)
        self.model.eval()
        outputs_CK = scoring.encode_windows(
            build_encoder(self.model, device=self.device, precision="fp32"),
            self.training_set.input_ids_T,
            windows,
            first_token_D=self.training_set.offsets[:-1][documents],
            special=self.special,
            batches=self.spec.batches,
        )
        self.model.train()
        return scoring.pool_windows(outputs_CK, windows, spec=self.spec.pooling, head=self.training_set.head)

    def _forward(self, batch: MiniBatch) -> Tensor:
        with self._autocast():
            input_ids_BT, attention_mask_BT = batch.padded()
            outputs_BK: Tensor = self.model(input_ids_BT.to(self.device), attention_mask_BT.to(self.device))
            return outputs_BK

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.spec.precision == "fp32":
            return nullcontext()
        dtype = torch.bfloat16 if self.spec.precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype=dtype)

    def _mini_batches(self, documents: Int64, windows: Windows) -> list[MiniBatch]:
        num_tokens_C = windows.stop_C - windows.start_C + self.special.num_tokens
        plan = plan_batches(num_tokens_C, max_batch_tokens=self.spec.batches.max_batch_tokens or BATCH_TOKENS)
        return [
            collate(
                rows_B,
                input_ids_T=self.training_set.input_ids_T,
                windows=windows,
                first_token_D=self.training_set.offsets[:-1][documents],
                special=self.special,
            )
            for rows_B in plan
        ]

    def _target(self, documents: Int64) -> Tensor:
        return torch.from_numpy(self.training_set.target[documents]).to(self.device)


def fine_tune(
    training_set: TrainingSet, spec: TrainSpec, *, encoder_source: str, checkpoint_uri: str, ranks: Ranks = ALONE
) -> FineTuningReceipt:
    """Fine-tune an encoder on labelled documents, and write the epoch with the least validation loss.

    Args:
        training_set: labelled documents.
        spec: how.
        encoder_source: local directory or hub name of the encoder to begin with.
        checkpoint_uri: directory to write.
        ranks: the processes that share the work; the others call `fit` with the same arguments.

    Raises:
        ConfigError: the encoder cannot be loaded or read such chunks, no document is left to train on, or the loss
            stops being a number.
    """
    clock = Stopwatch()
    with clock.time("training"):
        fitted = fit(training_set, spec, encoder_source=encoder_source, ranks=ranks)
    trainer, epochs, best = fitted.trainer, fitted.epochs, fitted.best
    card = _save(fitted, encoder_source=encoder_source, checkpoint_uri=checkpoint_uri)
    windows = trainer.windows
    return FineTuningReceipt(
        checkpoint_uri=checkpoint_uri,
        checkpoint_digest=card.digest,
        labels=training_set.head.labels,
        task=training_set.head.task,
        num_training_documents=fitted.num_training_documents,
        num_validation_documents=fitted.num_validation_documents,
        epochs=tuple(epochs),
        best_epoch=best + 1,
        calibration=card.calibration,
        metrics=card.metrics,
        num_chunks=windows.num_chunks,
        num_tokens_scored=int(windows.new_tokens_C().sum()),
        num_tokens_encoded=int((windows.stop_C - windows.start_C).sum()),
        training_s=clock.seconds["training"],
    )


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A trainer whose model has the weights of the best epoch."""

    trainer: Trainer
    epochs: list[Epoch]
    best: int
    """Position of the best one."""
    calibration: Calibration | None
    metrics: dict[str, Any]
    """Of the best one on the documents held out, calibrated; empty without any."""
    num_training_documents: int
    num_validation_documents: int


def fit(training_set: TrainingSet, spec: TrainSpec, *, encoder_source: str, ranks: Ranks = ALONE) -> Fitted:
    """Train; see `fine_tune`. All ranks do, and have the same weights afterwards."""
    torch.manual_seed(spec.seed)
    trainer = build_trainer(training_set, spec, encoder_source=encoder_source, ranks=ranks)
    held_out_D = training_set.held_out_D(spec.validation_fraction, spec.seed)
    training, validation = np.flatnonzero(~held_out_D), np.flatnonzero(held_out_D)
    if len(training) == 0:
        raise ConfigError(
            f"no document is left to train on: validation_fraction {spec.validation_fraction} holds out "
            f"all {len(validation)}"
        )
    if ranks.rank:
        torch.manual_seed(spec.seed + ranks.rank)  # the same weights, but dropout of its own
    best, epochs, logits_DL = _train(trainer, training, validation)
    found, measured = (None, {}) if logits_DL is None else trainer.calibrate(logits_DL, validation)
    return Fitted(
        trainer=trainer,
        epochs=epochs,
        best=best,
        calibration=found,
        metrics=measured,
        num_training_documents=len(training),
        num_validation_documents=len(validation),
    )


def load(plan: TrainPlan, receipts: list[ShardReceipt], corpus: CorpusSpec) -> TrainingSet:
    """The training set of a run's prepared shards.

    Raises:
        ConfigError: see `load_training_set`.
    """
    return load_training_set(
        [storage.join(plan.run.output_uri, file.path) for receipt in receipts for file in receipt.files_of("tokens")],
        task=plan.task,
        target_name=corpus.label_column,
        label_role=plan.label_role,
    )


def fine_tune_prepared(
    plan: TrainPlan, receipts: list[ShardReceipt], corpus: CorpusSpec, spec: TrainSpec
) -> FineTuningReceipt:
    """Fine-tune on prepared shards, into the run's folder.

    Args:
        plan: the run.
        receipts: of its prepared shards.
        corpus: columns; the label column names a regression's target.
        spec: how.

    Raises:
        ConfigError: see `load_training_set`, `fine_tune` and `data_parallel.ranks`.
        TransientError: one of several processes was killed.
    """
    training_set = load(plan, receipts, corpus)
    job = {
        "plan": plan.model_dump(mode="json"),
        "receipts": [receipt.model_dump(mode="json") for receipt in receipts],
        "corpus": corpus.model_dump(mode="json"),
        "spec": spec.model_dump(mode="json"),
        "storage": object_stores.configured(),
    }
    with data_parallel.ranks(spec.num_devices, spec.device, job) as ranks:
        receipt = fine_tune(
            training_set,
            spec,
            encoder_source=plan.encoder,
            checkpoint_uri=storage.join(plan.run.uri, "checkpoint"),
            ranks=ranks,
        )
    storage.write_bytes(_receipt_uri(plan.run), receipt.model_dump_json(indent=1).encode())
    return receipt


def republish(run: RunRef) -> Manifest | None:
    """As `publishing.republish`; a run that lost its checkpoint or receipt is not complete."""
    kept = (storage.join(run.uri, "checkpoint", CARD_NAME), _receipt_uri(run))
    return publishing.republish(run) if all(storage.exists(uri) for uri in kept) else None


def read_receipt(run: RunRef) -> FineTuningReceipt:
    """The receipt of a finished fine-tuning run."""
    return read_json(_receipt_uri(run), FineTuningReceipt, "the receipt of a fine-tuning")


def build_trainer(training_set: TrainingSet, spec: TrainSpec, *, encoder_source: str, ranks: Ranks = ALONE) -> Trainer:
    """Load the encoder, put a new head on it, and cut the documents.

    Raises:
        ConfigError: the encoder cannot be loaded or cannot read such chunks.
    """
    device = ranks.device or encoder.choose_device(spec.device)
    special = load_tokenizer(encoder_source).special
    model = ChunkModel(
        encoder.load_body(encoder_source, dropout=spec.dropout),
        num_logits=training_set.head.num_logits,
        pooling=spec.pooling,
    )
    encoder.check_chunk_size(spec.chunks, special, encoder.num_positions(model), source=encoder_source)
    windows = chunk_windows(np.diff(training_set.offsets), spec.chunks, document_seed_D=training_set.document_seed_D)
    return Trainer(
        model=model.to(device),
        training_set=training_set,
        windows=windows,
        special=special,
        spec=spec,
        device=device,
        ranks=ranks,
    )


def train_epochs(trainer: Trainer, documents: Int64) -> Iterator[list[float]]:
    """Train; yields the mean loss of every batch of documents, epoch by epoch.

    Raises:
        ConfigError: the loss is no longer a finite number.
    """
    spec, model = trainer.spec, trainer.model
    decayed = [weight for weight in model.parameters() if weight.ndim > 1]
    others = [weight for weight in model.parameters() if weight.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": spec.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=spec.learning_rate,
    )
    num_batches = math.ceil(len(documents) / spec.documents_per_batch)
    num_steps = spec.epochs * math.ceil(num_batches / spec.accumulation_steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(spec, num_steps))
    scaler = torch.amp.GradScaler(trainer.device.type, enabled=spec.precision == "fp16")
    model.train()
    progress.advance("fine-tune", 0, num_more=spec.epochs * len(documents))
    for epoch in range(spec.epochs):
        losses = []
        order = documents[epoch_order(len(documents), seed=spec.seed, epoch=epoch)]
        for step in _steps(order, spec):
            for batch in step:
                weight = len(batch) / sum(map(len, step))
                losses.append(trainer.batch_loss(batch, weight=weight, scale=scaler.scale))
                if not math.isfinite(losses[-1]):
                    raise ConfigError(
                        f"the loss became {losses[-1]} in epoch {epoch + 1}, after {len(losses)} batches: "
                        f"lower learning_rate ({spec.learning_rate})"
                    )
                progress.advance("fine-tune", len(batch))
            trainer.ranks.sum_gradients(model)
            scaler.unscale_(optimizer)
            if spec.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), spec.max_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            optimizer.zero_grad()
        yield losses


def epoch_order(num_documents: int, *, seed: int, epoch: int) -> Int64:
    """The order in which an epoch sees the documents, a permutation."""
    return np.random.default_rng([seed, epoch]).permutation(num_documents)


def _train(trainer: Trainer, training: Int64, validation: Int64) -> tuple[int, list[Epoch], Tensor | None]:
    """Train and leave the best epoch's weights in the model.

    Returns:
        Its position, all epochs, and the best one's pooled logits of the validation documents, where there are any.
    """
    epochs: list[Epoch] = []
    best, least, weights, best_logits_DL = 0, math.inf, None, None
    for position, losses in enumerate(train_epochs(trainer, training)):
        logits_DL, measured = trainer.evaluate(validation) if len(validation) else (None, None)
        epochs.append(
            Epoch(number=position + 1, training_loss=_mean_loss(losses, len(training), trainer), validation=measured)
        )
        if measured is None or measured["loss"] < least:
            best, least = position, math.inf if measured is None else measured["loss"]
            best_logits_DL = logits_DL
            weights = copy.deepcopy({name: weight.cpu() for name, weight in trainer.model.state_dict().items()})
    if weights is not None:
        trainer.model.load_state_dict(weights)
    return best, epochs, best_logits_DL


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


def _steps(order: Int64, spec: TrainSpec) -> Iterator[list[Int64]]:
    """Batches of documents, as many together as one move of the optimizer takes."""
    size = spec.documents_per_batch
    batches = [order[first : first + size] for first in range(0, len(order), size)]
    for first in range(0, len(batches), spec.accumulation_steps):
        yield batches[first : first + spec.accumulation_steps]


def _schedule(spec: TrainSpec, num_steps: int) -> Callable[[int], float]:
    """Learning rate as a share of its peak: linear warm-up, then linear to zero or constant."""
    num_warmup = math.ceil(spec.warmup_fraction * num_steps)

    def share(step: int) -> float:
        if step < num_warmup:
            return (step + 1) / (num_warmup + 1)
        return (num_steps - step) / max(num_steps - num_warmup, 1) if spec.schedule == "linear" else 1.0

    return share


def _mean_loss(losses: list[float], num_documents: int, trainer: Trainer) -> float:
    size = trainer.spec.documents_per_batch
    weights = [min(size, num_documents - first) for first in range(0, num_documents, size)]
    return sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / num_documents


def _receipt_uri(run: RunRef) -> str:
    return storage.join(run.uri, "fine_tuning.json")
