"""The exact gradient of a document loss in memory that does not grow with the document.

All chunks are forwarded in mini-batches without a graph, pooled, and the loss gives the gradient of every chunk's
output. Then chunks are forwarded once more, with a graph, and take their share of that gradient back to the weights.
The idea is that of GradCache (Gao et al. 2021, arXiv 2101.06983), applied to chunks of a document instead of
contrastive pairs. Only chunks with a gradient come again: with max pooling those that won.

Both forwards of a chunk must give the same output, though its neighbours differ: see `dropout.keyed`.

To PyTorch the loss is one function of the weights: `backward` works as on any other loss, once for each batch of
documents, so that gradient accumulation, loss scaling and DistributedDataParallel do too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from belt_tasks import memory
from belt_tasks.batches import plan_batches

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """C chunks to forward, as mini-batches within a budget."""

    num_tokens_C: Int64
    """Tokens of each, special tokens included."""
    max_batch_tokens: int
    """Rows x longest row of a mini-batch."""
    inputs: Callable[[Int64], Any]
    """What the model takes for a mini-batch of some rows."""

    def __len__(self) -> int:
        return len(self.num_tokens_C)

    def plan(self, rows: Int64) -> list[Int64]:
        """Some rows as mini-batches."""
        plan = plan_batches(self.num_tokens_C[rows], max_batch_tokens=self.max_batch_tokens)
        return [rows[part] for part in plan]


def document_loss(model: nn.Module, chunks: Chunks, loss_of_outputs: Callable[[Tensor], Tensor]) -> Tensor:
    """The loss of all chunks together, whose `backward` holds the graph of one mini-batch at a time.

    Chunks that fit one mini-batch take an ordinary graph and no second forward: same numbers.

    Args:
        model: maps the inputs of B chunks to outputs [B, K], the same for a chunk whenever and with whomever it comes.
        chunks: one or more.
        loss_of_outputs: a scalar from all chunk outputs, float32 (or wider) [C, K] in row order.
    """
    plan = chunks.plan(np.arange(len(chunks)))
    if len(plan) == 1:
        return loss_of_outputs(_in_order(plan, [_forward(model, chunks, plan[0])]))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    loss: Tensor = _DocumentLoss.apply(  # type: ignore[no-untyped-call]
        model, chunks, plan, loss_of_outputs, *weights
    )
    return loss


class _DocumentLoss(torch.autograd.Function):
    """See `document_loss`."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's
        model: nn.Module,
        chunks: Chunks,
        plan: Sequence[Int64],
        loss_of_outputs: Callable[[Tensor], Tensor],
        *_weights: Tensor,
    ) -> Tensor:
        outputs_CK = _in_order(plan, [_forward(model, chunks, rows_B) for rows_B in plan]).requires_grad_()
        with torch.enable_grad():
            loss = loss_of_outputs(outputs_CK)
        (ctx.gradient_CK,) = torch.autograd.grad(loss, outputs_CK)
        ctx.model, ctx.chunks = model, chunks
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - autograd's
        gradient_CK = ctx.gradient_CK * gradients[0]
        (rows,) = np.nonzero(gradient_CK.ne(0).any(dim=1).cpu().numpy())
        leaves = {
            name: weight.detach().requires_grad_(weight.requires_grad) for name, weight in ctx.model.named_parameters()
        }
        for rows_B in ctx.chunks.plan(rows):
            with torch.enable_grad():
                outputs_BK = _forward(_WithWeights(ctx.model, leaves), ctx.chunks, rows_B)
            torch.autograd.backward(outputs_BK, gradient_CK[torch.from_numpy(rows_B).to(gradient_CK.device)])
        trained = [leaf for leaf in leaves.values() if leaf.requires_grad]
        return None, None, None, None, *(leaf.grad for leaf in trained)


class _WithWeights:
    """A model with other tensors in the place of its weights."""

    def __init__(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        self._model, self._weights = model, weights

    def __call__(self, inputs: Any) -> Tensor:  # noqa: ANN401 - the model's
        outputs_BK: Tensor = torch.func.functional_call(self._model, self._weights, (inputs,))
        return outputs_BK


def _forward(model: Callable[[Any], Tensor], chunks: Chunks, rows_B: Int64) -> Tensor:
    memory.give_back()  # what the mini-batch before it had, or its gaps would make memory grow with the document
    outputs_BK = model(chunks.inputs(rows_B))
    return outputs_BK.to(torch.promote_types(outputs_BK.dtype, torch.float32))


def _in_order(plan: Sequence[Int64], parts: Sequence[Tensor]) -> Tensor:
    """Outputs of mini-batches as [C, K] by row."""
    back_C = torch.from_numpy(np.argsort(np.concatenate(plan)))
    return torch.cat(list(parts))[back_C.to(parts[0].device)]
