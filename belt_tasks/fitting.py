"""Fitting: a training loop with what people expect around it.

After every epoch the documents held out are scored, and the best weights are kept. States are saved every few minutes,
so that whoever comes after a crash goes on; measurements are logged; a loss that is no number any more ends it, with
the best weights so far kept.
"""

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from belt_tasks import progress, resampling, storage, training_state
from belt_tasks.calibration import Calibration
from belt_tasks.data_parallel import Ranks
from belt_tasks.errors import ConfigError
from belt_tasks.publishing import RunRef
from belt_tasks.specs import Spec, TrainSpec
from belt_tasks.trainer import Trainer, build_trainer
from belt_tasks.training_log import TrainingLog, mlflow_tracker
from belt_tasks.training_loop import DivergedError, StepEnd, TrainingLoop
from belt_tasks.training_set import TrainingSet, check_task, label_weights, lonely_labels
from belt_tasks.training_state import TrainingState, TrainingStates

Int64 = npt.NDArray[np.int64]


class Epoch(Spec):
    """One pass over the training documents."""

    number: int
    """From 1."""
    training_loss: float
    """Mean over documents, while the weights moved."""
    validation: dict[str, float] | None
    """Loss and metrics on the held-out documents after the epoch, not calibrated, those that are one defined number;
    None without any."""


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
    lonely_labels: tuple[str, ...]
    """Labels that a single training document has."""
    training_s: float
    """Of all attempts, but for work that a crash undid."""
    resumed_from_step: int | None = None
    """The step after which this attempt took up an earlier one; None if it began anew."""


Keeper = Callable[[Fitted], str]
"""Keeps a checkpoint of what was reached when training broke off; returns where."""


def fit(
    training_set: TrainingSet,
    spec: TrainSpec,
    *,
    encoder_source: str,
    ranks: Ranks,
    run: RunRef | None = None,
    keep: Keeper | None = None,
) -> Fitted:
    """Train, from the last state of an earlier attempt where there is one.

    All ranks do, and have the same weights afterwards.

    Args:
        training_set: labelled documents.
        spec: how.
        encoder_source: local directory or hub name of the encoder to begin with.
        ranks: the processes that share the work.
        run: in whose folder states and measurements are kept; None keeps none.
        keep: called by rank 0 if the loss stops being a number after an epoch that was good.

    Raises:
        ConfigError: the encoder cannot be loaded or read such chunks, the documents do not fit the spec, or the loss
            stops being a number.
    """
    training, validation = _split(training_set, spec)
    trainer = _weighed(build_trainer(training_set, spec, encoder_source=encoder_source, ranks=ranks), training)
    _begin_at_the_mean(trainer, training)
    fitting = _Fitting(trainer=trainer, training=training, validation=validation, run=run)
    try:
        return fitting.run_to_end()
    except DivergedError as error:
        fitting.end("FAILED")
        if fitting.epochs and keep is not None and ranks.rank == 0:
            where = keep(fitting.fitted())
            raise DivergedError(f"{error}; the weights of epoch {fitting.best + 1} are kept in {where}") from None
        raise
    except BaseException:
        fitting.end("KILLED")
        raise


def metrics_uri(run: RunRef) -> str:
    """Where a run's measurements are, as JSON lines."""
    return storage.join(run.uri, "metrics.jsonl")


def read_metrics(run: RunRef) -> list[dict[str, Any]]:
    """What a run measured: see `TrainingLog`."""
    return [json.loads(line) for line in storage.read_bytes(metrics_uri(run)).decode().splitlines()]


def forget(run: RunRef) -> None:
    """Remove a run's states: it is published."""
    _states(run).remove()


def _weighed(trainer: Trainer, training: Int64) -> Trainer:
    """A trainer that weighs documents and labels as its spec and its training set say.

    Raises:
        ConfigError: see `training_set.label_weights`.
    """
    given_D, spec = trainer.training_set.weight_D, trainer.spec
    return replace(
        trainer,
        weight_D=None if given_D is None else given_D / given_D[training].mean(),
        label_weight_L=label_weights(trainer.training_set, training, spec.label_weights),
    )


def _begin_at_the_mean(trainer: Trainer, training: Int64) -> None:
    """A regression begins at the mean of its targets, which may be far from zero: no step is lost on it."""
    if trainer.training_set.head.task != "regression":
        return
    weight_D = None if trainer.weight_D is None else trainer.weight_D[training]
    mean = float(np.average(trainer.training_set.target[training], weights=weight_D))
    with torch.no_grad():
        trainer.model.head.linear.bias.fill_(mean)


def _states(run: RunRef) -> TrainingStates:
    return TrainingStates(storage.join(run.uri, "training"))


def _split(training_set: TrainingSet, spec: TrainSpec) -> tuple[Int64, Int64]:
    """Documents to train on, and documents held out."""
    held_out_D = training_set.held_out_D(spec.validation_fraction, spec.seed)
    training, validation = np.flatnonzero(~held_out_D), np.flatnonzero(held_out_D)
    if len(training) == 0:
        raise ConfigError(
            f"no document is left to train on: validation_fraction {spec.validation_fraction} holds out "
            f"all {len(validation)}"
        )
    check_task(training_set.head.task, spec)
    if len(validation) == 0 and (spec.early_stopping_patience is not None or spec.metric_for_best_model is not None):
        raise ConfigError(
            "early_stopping_patience and metric_for_best_model need documents held out, but there are none: "
            f"raise validation_fraction ({spec.validation_fraction}) or name a validation_split"
        )
    return training, validation


@dataclass(kw_only=True)
class _Fitting:
    """One fine-tuning under way."""

    trainer: Trainer
    training: Int64
    validation: Int64
    run: RunRef | None
    epochs: list[Epoch] = field(default_factory=list)
    best: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    best_logits_DL: Tensor | None = None
    training_s: float = 0.0
    resumed_from_step: int | None = None

    def __post_init__(self) -> None:
        self._is_first = self.trainer.ranks.rank == 0
        self._states = None if self.run is None else _states(self.run)
        self._log = TrainingLog(None if self.run is None or not self._is_first else metrics_uri(self.run))
        self._loop = TrainingLoop(trainer=self.trainer, documents=self.training, on_step=self._after_step)
        self._is_taken_up = False
        self._clock = self._saved_at = time.monotonic()

    def run_to_end(self) -> Fitted:
        """Train, and leave the best epoch's weights in the model."""
        self._take_up()
        if not self._is_over():
            for losses in self._loop.epochs():
                self._end_epoch(losses)
                if self._is_over():
                    break
        self.end("FINISHED")
        return self.fitted()

    def fitted(self) -> Fitted:
        """What was reached, with the best weights in the model."""
        self.trainer.model.load_state_dict(self.best_weights)
        found, measured = (
            (None, {}) if self.best_logits_DL is None else self.trainer.calibrate(self.best_logits_DL, self.validation)
        )
        return Fitted(
            trainer=self.trainer,
            epochs=self.epochs,
            best=self.best,
            calibration=found,
            metrics=measured,
            num_training_documents=len(self.training),
            num_validation_documents=len(self.validation),
            lonely_labels=lonely_labels(self.trainer.training_set, self.training),
            training_s=self.training_s,
            resumed_from_step=self.resumed_from_step,
        )

    def end(self, status: str) -> None:
        """Put what was measured; before an earlier attempt is taken up, its measurements stay."""
        if self._is_first:
            if self._is_taken_up:
                self._log.put()
            self._log.end(status)

    def _take_up(self) -> None:
        """Restore the last state, if there is one; nobody saves another before all ranks have."""
        state = None if self._states is None else self._states.last()
        if state is not None:
            tensors, told = state.tensors, state.told
            self._loop.restore(tensors, told["loop"])
            self.epochs = [Epoch.model_validate(epoch) for epoch in told["epochs"]]
            self.best, self.training_s = told["best"], told["training_s"]
            self.best_weights = training_state.of("best.", tensors)
            self.best_logits_DL = tensors.get("best_logits")
            self._log.take_up(told["num_lines"])
            self.resumed_from_step = state.num_steps
            progress.say(f"the fine-tuning goes on after step {state.num_steps:,}, where an earlier attempt ended")
        if self._is_first and self.run is not None:
            known = None if state is None else state.told["mlflow_run_id"]
            self._log.tracker = mlflow_tracker(f"fine-tune {self.run.run_id}", self.trainer.spec.model_dump(), known)
        self._is_taken_up = True
        self.trainer.ranks.accelerator.wait_for_everyone()
        self._clock = self._saved_at = time.monotonic()

    def _end_epoch(self, losses: list[float]) -> None:
        number, logits_DL, measured = len(self.epochs) + 1, None, None
        if len(self.validation):
            logits_DL = self.trainer.logits(self.validation)
            self._loop.check_finite("largest logit of the documents held out", logits_DL.abs().max().item(), number)
            measured = _plain(self.trainer.measure(logits_DL, self.validation))
        epoch = Epoch(number=number, training_loss=self._loop.mean_loss(losses), validation=measured)
        self.epochs.append(epoch)
        if self._is_best():
            self.best, self.best_logits_DL = number - 1, logits_DL
            weights = self.trainer.model.state_dict()
            self.best_weights = copy.deepcopy({name: weight.cpu() for name, weight in weights.items()})
        self._log.add(
            "epoch", self._loop.num_steps, epoch=number, training_loss=epoch.training_loss, validation=measured
        )
        self._save()

    def _is_best(self) -> bool:
        """Whether the last epoch is; without documents held out it is."""
        last, best = self._merit(len(self.epochs) - 1), self._merit(self.best)
        return len(self.epochs) == 1 or last is None or (best is not None and last > best)

    def _is_over(self) -> bool:
        """Whether patience is at its end."""
        patience = self.trainer.spec.early_stopping_patience
        return patience is not None and len(self.epochs) - 1 - self.best >= patience

    def _merit(self, position: int) -> tuple[float, ...] | None:
        """How good an epoch is, more is better; the loss decides between equals. None without documents held out."""
        validation = self.epochs[position].validation
        if validation is None:
            return None
        return tuple(
            _gain(name, validation.get(name)) for name in (self.trainer.spec.metric_for_best_model or "loss", "loss")
        )

    def _after_step(self, step: StepEnd) -> None:
        self._log.add(
            "step",
            step.number,
            epoch=step.epoch,
            loss=step.loss,
            learning_rate=step.learning_rate,
            gradient_norm=step.gradient_norm,
            num_documents=step.num_documents,
            num_tokens=step.num_tokens,
            seconds=round(step.seconds, 4),
        )
        if time.monotonic() - self._saved_at >= self.trainer.spec.save_every_s:
            self._save()

    def _save(self) -> None:
        now = time.monotonic()
        self.training_s, self._clock = self.training_s + now - self._clock, now
        if self._states is None or not self._is_first:
            return
        self._log.put()
        tensors, told = self._loop.state()
        tensors |= training_state.under("best.", self.best_weights)
        if self.best_logits_DL is not None:
            tensors["best_logits"] = self.best_logits_DL
        tracker = self._log.tracker
        told = {
            "loop": told,
            "num_steps": self._loop.num_steps,
            "epochs": [epoch.model_dump(mode="json") for epoch in self.epochs],
            "best": self.best,
            "training_s": self.training_s,
            "num_lines": len(self._log.lines),
            "mlflow_run_id": getattr(tracker, "run_id", None),
        }
        self._states.save(TrainingState(num_steps=self._loop.num_steps, tensors=tensors, told=told))
        self._saved_at = time.monotonic()


def _gain(name: str, value: float | None) -> float:
    """A metric as what is better the more it is; no number is the worst."""
    if value is None or math.isnan(value):
        return -math.inf
    return float(-value if name == "loss" or name in resampling.LOWER_IS_BETTER else value)


def _plain(measured: dict[str, Any]) -> dict[str, float]:
    """The numbers among metrics: matrices of many labels would fill states and receipts."""
    return {name: value for name, value in measured.items() if isinstance(value, int | float)}
