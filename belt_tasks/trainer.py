"""The trainer: what one fine-tuning holds, the loss of a batch of documents, and how good the weights are.

Shape letters: B chunks of a mini-batch, C chunks, D documents, K outputs of a chunk, L logits.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from belt_tasks import calibration, dropout, dropout_mask, encoder, gradient, heads, metrics, scoring
from belt_tasks.batches import MiniBatch, collate
from belt_tasks.calibration import Calibration
from belt_tasks.data_parallel import Ranks
from belt_tasks.encoder import ChunkModel
from belt_tasks.engine import ChunkEncoder, build_encoder
from belt_tasks.errors import ConfigError
from belt_tasks.gradient import Chunks
from belt_tasks.specs import ChunkSpec, TrainSpec
from belt_tasks.tokens import SpecialTokens, load_tokenizer
from belt_tasks.training_set import TrainingSet
from belt_tasks.windows import Windows, chunk_windows

Int64 = npt.NDArray[np.int64]

BATCH_TOKENS = 16_384  # of a forward with a graph, where the spec names none
EVALUATION_TOKENS = 4_000_000  # whose chunks are planned together
MOST_SEED = 2**31


@dataclass(kw_only=True)
class Trainer:
    """Everything that one fine-tuning holds while it runs."""

    model: ChunkModel
    training_set: TrainingSet
    special: SpecialTokens
    spec: TrainSpec
    ranks: Ranks
    weight_D: npt.NDArray[np.float64] | None = None
    """How much each document counts; None where all count the same."""
    label_weight_L: npt.NDArray[np.float64] | None = None
    """See `heads.losses`."""

    @property
    def device(self) -> torch.device:
        """This rank's, where the model is."""
        return self.ranks.device

    @cached_property
    def windows(self) -> Windows:
        """Of all documents, as they are scored."""
        return self._windows(np.arange(len(self.training_set.num_tokens_D)), self.spec.chunks)

    @cached_property
    def module(self) -> nn.Module:
        """A batch's loss as a module, which DistributedDataParallel wraps where there are several ranks."""
        module: nn.Module = self.ranks.accelerator.prepare_model(_BatchLoss(self), device_placement=False)
        return module

    def add_gradient(self, documents: Int64, *, epoch: int, weight: float, is_last: bool) -> float:
        """Add the gradient of `weight` x the mean loss of some documents to the weights.

        Args:
            documents: of all ranks; each takes its share.
            epoch: from 0; decides which numbers dropout drops, and which chunks are drawn.
            weight: of this batch in its optimizer step.
            is_last: whether it is the last of the step, with which gradients of ranks are averaged.

        Returns:
            The mean loss of all these documents, each by its weight.
        """
        mine = self.ranks.share(documents)
        share = len(mine) / len(documents)
        with self.ranks.accumulating(self.module, is_last=is_last):
            loss = self.module(mine, epoch)
            # gradients are averaged over the ranks, but every document counts the same
            self.ranks.backward(loss * (weight * share * self.ranks.size))
        return self.ranks.sum(loss.item() * share)

    def chunks(self, documents: Int64, epoch: int) -> tuple[Windows, Chunks]:
        """Windows of documents in an epoch, and how they become mini-batches."""
        windows = self._epoch_windows(documents, epoch)
        key_D = dropout_mask.mixed(
            torch.from_numpy(self.training_set.document_seed_D[documents]), self.spec.seed % MOST_SEED, epoch
        )
        key_C = dropout_mask.mixed(
            key_D[torch.from_numpy(windows.doc_of_chunk_C)], torch.from_numpy(windows.chunk_index_C)
        ).to(self.device)

        first_token_D = self.training_set.first_token_D[documents]

        def of_rows(rows_B: Int64) -> tuple[MiniBatch, Tensor]:
            batch = collate(
                rows_B,
                input_ids_T=self.training_set.input_ids_T,
                windows=windows,
                first_token_D=first_token_D,
                special=self.special,
            )
            return batch, key_C[torch.from_numpy(rows_B).to(self.device)]

        chunks = Chunks(
            num_tokens_C=windows.stop_C - windows.start_C + self.special.num_tokens,
            max_batch_tokens=self.spec.batches.max_batch_tokens or BATCH_TOKENS,
            inputs=of_rows,
        )
        return windows, chunks

    def loss_of_pooled(self, pooled_DL: Tensor, documents: Int64) -> Tensor:
        """Mean loss of pooled logits of documents, each by its weight."""
        target = torch.from_numpy(self.training_set.target[documents]).to(self.device)
        label_weight_L = None if self.label_weight_L is None else torch.from_numpy(self.label_weight_L).to(pooled_DL)
        losses_D = heads.losses(pooled_DL, target, self.training_set.head, label_weight_L)
        if self.weight_D is not None:
            losses_D = losses_D * torch.from_numpy(self.weight_D[documents]).to(pooled_DL)
        return losses_D.mean()

    def logits(self, documents: Int64) -> Tensor:
        """Pooled logits [D, L] of some documents, in eval mode and on the CPU."""
        head = self.training_set.head
        mine = self.ranks.share(documents)
        parts = [torch.zeros(0, head.num_logits)]
        num_tokens_D = np.cumsum(self.training_set.num_tokens_D[mine])
        cuts = np.searchsorted(num_tokens_D, np.arange(EVALUATION_TOKENS, sum(num_tokens_D[-1:]), EVALUATION_TOKENS))
        self.model.eval()
        chunk_encoder = build_encoder(self.model, device=self.device, precision="fp32")
        parts += [self._logits(part, chunk_encoder) for part in np.split(mine, cuts) if len(part)]
        self.model.train()
        return self.ranks.gather(torch.cat(parts), num_rows=len(documents))

    def measure(self, logits_DL: Tensor, documents: Int64, calibrated_by: Calibration | None = None) -> dict[str, Any]:
        """Loss and metrics of pooled logits of some documents, all of which weigh the same."""
        head, target = self.training_set.head, self.training_set.target[documents]
        logits_DL = calibration.calibrated(logits_DL, calibrated_by)
        loss = heads.losses(logits_DL, torch.from_numpy(target), head).mean().item()
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

    def _logits(self, documents: Int64, chunk_encoder: ChunkEncoder) -> Tensor:
        """Pooled logits [D, L] of documents, on the CPU."""
        windows = self.windows.of_documents(documents)
        outputs_CK = scoring.encode_windows(
            chunk_encoder,
            self.training_set.input_ids_T,
            windows,
            first_token_D=self.training_set.first_token_D[documents],
            special=self.special,
            batches=self.spec.batches,
        )
        return scoring.pool_windows(outputs_CK, windows, spec=self.spec.pooling, head=self.training_set.head)

    def _epoch_windows(self, documents: Int64, epoch: int) -> Windows:
        if not self.spec.redraw_chunks:
            return self.windows.of_documents(documents)
        spec = self.spec.chunks
        seed = int(np.random.default_rng([spec.seed, epoch]).integers(MOST_SEED))
        return self._windows(documents, spec.model_copy(update={"seed": seed}))

    def _windows(self, documents: Int64, spec: ChunkSpec) -> Windows:
        return chunk_windows(
            self.training_set.num_tokens_D[documents],
            spec,
            document_seed_D=self.training_set.document_seed_D[documents],
        )


class _BatchLoss(nn.Module):
    """The mean loss of this rank's documents of a batch, differentiable in the weights."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__()
        self.chunk_outputs = _ChunkOutputs(trainer.model, trainer.ranks)
        self._trainer = trainer

    def forward(self, documents: Int64, epoch: int) -> Tensor:
        """A scalar; zero without documents."""
        trainer = self._trainer
        loss = self._anchor() if trainer.ranks.size > 1 else torch.zeros((), device=trainer.device)
        if len(documents) == 0:
            return loss
        windows, chunks = trainer.chunks(documents, epoch)

        def loss_of_outputs(outputs_CK: Tensor) -> Tensor:
            head = trainer.training_set.head
            pooled_DL = scoring.pool_windows(outputs_CK, windows, spec=trainer.spec.pooling, head=head)
            return trainer.loss_of_pooled(pooled_DL, documents)

        return loss + gradient.document_loss(self.chunk_outputs, chunks, loss_of_outputs)

    def _anchor(self) -> Tensor:
        """Zero, but with a gradient for every weight: ranks wait for each other's."""
        return torch.stack([weight.sum() for weight in self.parameters()]).sum() * 0.0


class _ChunkOutputs(nn.Module):
    """Outputs of a mini-batch's chunks while training: the same for a chunk, whoever shares its mini-batch."""

    def __init__(self, model: ChunkModel, ranks: Ranks) -> None:
        super().__init__()
        self.model = model
        self._ranks = ranks
        self._is_checked = False

    def forward(self, inputs: tuple[MiniBatch, Tensor]) -> Tensor:
        """Chunk outputs [B, K] of a mini-batch and the keys of its chunks, int64 [B]."""
        (batch, key_B), device = inputs, self._ranks.device
        before = None if self._is_checked else torch.get_rng_state()
        input_ids_BT, attention_mask_BT = batch.padded()
        with ExitStack() as stack:
            stack.enter_context(self._ranks.accelerator.autocast())
            if self.training:
                stack.enter_context(dropout.keyed(key_B))
            outputs_BK: Tensor = self.model(input_ids_BT.to(device), attention_mask_BT.to(device))
        if before is not None and self.training:
            self._is_checked = True
            if not torch.equal(before, torch.get_rng_state()):
                raise ConfigError(
                    "this encoder draws random numbers that belt cannot repeat, so that its gradient would be wrong: "
                    "fine-tune it with dropout: 0"
                )
        return outputs_BK


def build_trainer(training_set: TrainingSet, spec: TrainSpec, *, encoder_source: str, ranks: Ranks) -> Trainer:
    """Load the encoder, and put a new head on it, drawn by the spec's seed.

    Raises:
        ConfigError: the encoder cannot be loaded or cannot read such chunks.
    """
    torch.manual_seed(spec.seed)
    special = load_tokenizer(encoder_source).special
    model = ChunkModel(
        encoder.load_body(encoder_source, dropout=spec.dropout),
        num_logits=training_set.head.num_logits,
        pooling=spec.pooling,
    )
    encoder.check_chunk_size(spec.chunks, special, encoder.num_positions(model), source=encoder_source)
    return Trainer(model=model.to(ranks.device), training_set=training_set, special=special, spec=spec, ranks=ranks)
