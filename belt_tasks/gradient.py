"""The exact gradient of a document loss in memory that does not grow with the document.

All chunks are forwarded in mini-batches without a graph, pooled, and the loss gives the gradient of every chunk's
output. Then each mini-batch is forwarded once more, with a graph and under the same random state, and takes its share
of that gradient back to the weights: the sum is the gradient of one big pass over the same mini-batches. The idea is
that of GradCache (Gao et al. 2021, arXiv 2101.06983), applied to chunks of a document instead of contrastive pairs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from belt_tasks.batches import MiniBatch


def accumulate_gradient(
    forward: Callable[[MiniBatch], Tensor],
    batches: Sequence[MiniBatch],
    loss_of_outputs: Callable[[Tensor], Tensor],
    *,
    device: torch.device,
) -> float:
    """Add the gradient of a loss over all chunks to the weights, one mini-batch in memory at a time.

    With max pooling a mini-batch in which no chunk won has no gradient and is not forwarded again. A single mini-batch
    needs no second forward.

    Args:
        forward: chunk outputs [B, K] of a mini-batch; draws random numbers (dropout) from the default generators.
        batches: their rows are a permutation of 0 .. C - 1.
        loss_of_outputs: a scalar from all chunk outputs, float32 [C, K] in row order.
        device: where forward works.

    Returns:
        The loss.
    """
    rows_C = torch.cat([torch.from_numpy(batch.rows_B) for batch in batches]).to(device)
    back_C = torch.argsort(rows_C)
    if len(batches) == 1:
        loss = loss_of_outputs(forward(batches[0]).float()[back_C])
        torch.autograd.backward(loss)
        return loss.item()

    states: list[_RandomState] = []
    parts: list[Tensor] = []
    with torch.no_grad():
        for batch in batches:
            states.append(_RandomState.of(device))
            parts.append(forward(batch).float())
    after = _RandomState.of(device)
    outputs_CK = torch.cat(parts)[back_C].requires_grad_()
    loss = loss_of_outputs(outputs_CK)
    (gradient_CK,) = torch.autograd.grad(loss, outputs_CK)

    for batch, state in zip(batches, states, strict=True):
        gradient_BK = gradient_CK[torch.from_numpy(batch.rows_B).to(device)]
        if gradient_BK.any():
            state.restore()
            torch.autograd.backward(forward(batch).float(), gradient_BK)
    after.restore()
    return loss.item()


@dataclass(frozen=True)
class _RandomState:
    """The default generators' states, of the CPU and of the device."""

    cpu: Tensor
    cuda: Tensor | None
    device: torch.device

    @classmethod
    def of(cls, device: torch.device) -> "_RandomState":
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), cuda, device)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)
