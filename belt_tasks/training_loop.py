"""The training loop: steps of the optimizer over epochs of shuffled documents, which may be left and taken up again.

What a step does depends on the weights, the optimizer's moments and its number alone: shuffling and dropout are
functions of the seed, the epoch and the document. So a loop that is restored goes on as if it had not been left.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from belt_tasks import progress, training_state
from belt_tasks.errors import ConfigError
from belt_tasks.specs import TrainSpec
from belt_tasks.trainer import Trainer

Int64 = npt.NDArray[np.int64]


class DivergedError(ConfigError):
    """The loss or its gradient is no finite number any more."""


@dataclass(frozen=True, kw_only=True)
class StepEnd:
    """What one step of the optimizer did."""

    number: int
    """From 1, over all epochs."""
    epoch: int
    """From 1."""
    loss: float
    """Mean over its documents."""
    learning_rate: float
    gradient_norm: float
    """Before it was clipped."""
    num_documents: int
    num_tokens: int
    """Content tokens of these documents."""
    seconds: float


@dataclass(kw_only=True)
class TrainingLoop:
    """Where a training is, and what moves the weights."""

    trainer: Trainer
    documents: Int64
    """Those that are trained on."""
    on_step: Callable[[StepEnd], None] = lambda _: None
    """Called after every step."""
    num_steps: int = 0
    """Steps that are done."""
    epoch: int = 0
    """Epochs that are done."""
    losses: list[float] = field(default_factory=list)
    """Of the document batches of the epoch that is under way."""

    def __post_init__(self) -> None:
        """Make the optimizer."""
        spec, model = self.trainer.spec, self.trainer.model
        self.trainer.module.train()  # all ranks have rank 0's weights from here on
        decayed = [weight for weight in model.parameters() if weight.ndim > 1]
        others = [weight for weight in model.parameters() if weight.ndim <= 1]
        self._inner = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": spec.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=spec.learning_rate,
        )
        accelerator = self.trainer.ranks.accelerator
        self._optimizer = accelerator.prepare_optimizer(self._inner, device_placement=False)
        self._steps_per_epoch = math.ceil(
            math.ceil(len(self.documents) / spec.documents_per_batch) / spec.accumulation_steps
        )
        self._share = schedule(spec, spec.epochs * self._steps_per_epoch)

    def epochs(self) -> Iterator[list[float]]:
        """Train from where the loop is; yields the mean loss of every batch of documents, epoch by epoch.

        Raises:
            DivergedError: the loss or its gradient is no finite number any more; the weights are those before it.
        """
        spec = self.trainer.spec
        num_left = spec.epochs * len(self.documents) - self._num_documents_done()
        progress.advance("fine-tune", 0, num_more=num_left)
        while self.epoch < spec.epochs:
            done = self.num_steps - self.epoch * self._steps_per_epoch
            order = self.documents[epoch_order(len(self.documents), seed=spec.seed, epoch=self.epoch)]
            for step in _steps(order, spec)[done:]:
                self._step(step, self.epoch)
            losses, self.losses, self.epoch = self.losses, [], self.epoch + 1
            yield losses

    def mean_loss(self, losses: list[float]) -> float:
        """Of an epoch, over its documents, by the losses of its batches."""
        size, num_documents = self.trainer.spec.documents_per_batch, len(self.documents)
        weights = [min(size, num_documents - first) for first in range(0, num_documents, size)]
        return sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / num_documents

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the next step depends on: tensors, and the rest as JSON."""
        moments = {
            f"{number}.{name}": value
            for number, values in self._inner.state_dict()["state"].items()
            for name, value in values.items()
        }
        tensors = training_state.under("weights.", self.trainer.model.state_dict())
        scaler = self.trainer.ranks.accelerator.scaler
        told = {
            "num_steps": self.num_steps,
            "epoch": self.epoch,
            "losses": self.losses,
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        return tensors | training_state.under("optimizer.", moments), told

    def restore(self, tensors: dict[str, Tensor], told: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.trainer.model.load_state_dict(training_state.of("weights.", tensors))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in training_state.of("optimizer.", tensors).items():
            number, _, kind = name.partition(".")
            moments.setdefault(int(number), {})[kind] = value
        self._inner.load_state_dict(self._inner.state_dict() | {"state": moments})
        if told["scaler"] is not None:
            self.trainer.ranks.accelerator.scaler.load_state_dict(told["scaler"])
        self.num_steps, self.epoch, self.losses = told["num_steps"], told["epoch"], list(told["losses"])

    def _step(self, batches: list[Int64], epoch: int) -> None:
        started = time.perf_counter()
        spec, trainer = self.trainer.spec, self.trainer
        num_documents, loss = sum(map(len, batches)), 0.0
        for batch in batches:
            weight = len(batch) / num_documents
            self.losses.append(trainer.add_gradient(batch, epoch=epoch, weight=weight, is_last=batch is batches[-1]))
            loss += weight * self.losses[-1]
            self.check_finite("loss", self.losses[-1], epoch + 1)
            progress.advance("fine-tune", len(batch))
        learning_rate = spec.learning_rate * self._share(self.num_steps)
        for group in self._inner.param_groups:
            group["lr"] = learning_rate
        accelerator = trainer.ranks.accelerator
        norm = accelerator.clip_grad_norm_(
            trainer.model.parameters(), math.inf if spec.max_grad_norm is None else spec.max_grad_norm
        ).item()
        if accelerator.scaler is None:  # which leaves out a step that overflows
            self.check_finite("norm of the gradient", norm, epoch + 1)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.num_steps += 1
        self.on_step(
            StepEnd(
                number=self.num_steps,
                epoch=epoch + 1,
                loss=loss,
                learning_rate=learning_rate,
                gradient_norm=norm,
                num_documents=num_documents,
                num_tokens=int(trainer.training_set.num_tokens_D[np.concatenate(batches)].sum()),
                seconds=time.perf_counter() - started,
            )
        )

    def check_finite(self, what: str, value: float, epoch: int) -> None:
        """See that a number is one.

        Args:
            what: it is.
            value: the number.
            epoch: in which it was measured, from 1.

        Raises:
            DivergedError: it is none.
        """
        if not math.isfinite(value):
            raise DivergedError(
                f"the {what} became {value} in epoch {epoch}, after {self.num_steps} steps: "
                f"lower learning_rate ({self.trainer.spec.learning_rate})"
            )

    def _num_documents_done(self) -> int:
        epoch, steps = divmod(self.num_steps, self._steps_per_epoch)
        size = self.trainer.spec.documents_per_batch * self.trainer.spec.accumulation_steps
        return epoch * len(self.documents) + min(steps * size, len(self.documents))


def epoch_order(num_documents: int, *, seed: int, epoch: int) -> Int64:
    """The order in which an epoch sees the documents, a permutation."""
    return np.random.default_rng([seed, epoch]).permutation(num_documents)


def schedule(spec: TrainSpec, num_steps: int) -> Callable[[int], float]:
    """Learning rate as a share of its peak: linear warm-up, then linear to zero or constant."""
    num_warmup = math.ceil(spec.warmup_fraction * num_steps)

    def share(step: int) -> float:
        if step < num_warmup:
            return (step + 1) / (num_warmup + 1)
        return (num_steps - step) / max(num_steps - num_warmup, 1) if spec.schedule == "linear" else 1.0

    return share


def _steps(order: Int64, spec: TrainSpec) -> list[list[Int64]]:
    """Batches of documents, as many together as one move of the optimizer takes."""
    size = spec.documents_per_batch
    batches = [order[first : first + size] for first in range(0, len(order), size)]
    return [
        batches[first : first + spec.accumulation_steps] for first in range(0, len(batches), spec.accumulation_steps)
    ]
