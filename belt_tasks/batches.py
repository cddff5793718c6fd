"""Mini-batches of chunks: which chunks share a forward, and the tensors they become.

Plans are made across documents, longest chunk first: little padding, and an out-of-memory error shows in the first
mini-batch rather than after an hour. Which chunks are neighbours never changes a result beyond float noise.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from belt_tasks.tokens import SpecialTokens
from belt_tasks.windows import Windows

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class MiniBatch:
    """B chunks with their special tokens, one after the other: T tokens and no padding."""

    rows_B: Int64
    """Where each chunk's output belongs among the C chunks."""
    input_ids_T: Tensor
    """int64."""
    num_tokens_B: Int64
    """Tokens of each chunk, special tokens included."""
    pad_id: int
    """What `padded` fills rows with."""

    def __len__(self) -> int:
        return len(self.rows_B)

    def padded(self) -> tuple[Tensor, Tensor]:
        """As Hugging Face models read it: input_ids and attention_mask, int64 [B, longest]."""
        num_tokens_B1 = torch.from_numpy(self.num_tokens_B)[:, None]
        filled_BT = torch.arange(int(self.num_tokens_B.max())) < num_tokens_B1
        input_ids_BT = torch.full(filled_BT.shape, self.pad_id)
        input_ids_BT[filled_BT] = self.input_ids_T
        return input_ids_BT, filled_BT.long()


def num_positions(plan: list[Int64], num_tokens_C: Int64) -> int:
    """Positions of a plan's mini-batches when each is padded to its longest chunk."""
    return sum(len(rows_B) * int(num_tokens_C[rows_B].max()) for rows_B in plan)


def plan_batches(num_tokens_C: Int64, *, max_batch_tokens: int) -> list[Int64]:
    """Group C chunks into mini-batches by a token budget.

    Args:
        num_tokens_C: tokens of each chunk, special tokens included.
        max_batch_tokens: rows x longest row stays within this, unless one chunk alone exceeds it.

    Returns:
        Row numbers of each mini-batch, a permutation of 0 .. C - 1 in all, longest chunks first.
    """
    order_C = np.argsort(-num_tokens_C, kind="stable")
    batches = []
    first = 0
    while first < len(order_C):
        longest = max(int(num_tokens_C[order_C[first]]), 1)
        last = first + max(max_batch_tokens // longest, 1)
        batches.append(order_C[first:last])
        first = last
    return batches


def collate(
    rows_B: Int64,
    *,
    input_ids_T: npt.NDArray[np.int32],
    windows: Windows,
    first_token_D: Int64,
    special: SpecialTokens,
) -> MiniBatch:
    """Put one mini-batch together.

    Args:
        rows_B: chunks to take, as row numbers of `windows`.
        input_ids_T: content tokens of all documents, one after the other.
        windows: C windows.
        first_token_D: where each document of `windows` begins in `input_ids_T`.
        special: tokens to put around and behind the content.
    """
    base_B = first_token_D[windows.doc_of_chunk_C[rows_B]]
    start_B, length_B = base_B + windows.start_C[rows_B], (windows.stop_C - windows.start_C)[rows_B]
    num_tokens_B = length_B + special.num_tokens
    stop_B = np.cumsum(num_tokens_B)
    first_B = stop_B - num_tokens_B
    prefix, suffix = len(special.prefix_ids), len(special.suffix_ids)
    packed_T = np.empty(stop_B[-1], dtype=np.int64)
    content_first_B = np.cumsum(length_B) - length_B
    position_T = np.arange(length_B.sum())
    packed_T[np.repeat(first_B + prefix - content_first_B, length_B) + position_T] = input_ids_T[
        np.repeat(start_B - content_first_B, length_B) + position_T
    ]
    packed_T[first_B[:, None] + np.arange(prefix)] = special.prefix_ids
    packed_T[stop_B[:, None] - suffix + np.arange(suffix)] = special.suffix_ids
    return MiniBatch(
        rows_B=rows_B, input_ids_T=torch.from_numpy(packed_T), num_tokens_B=num_tokens_B, pad_id=special.pad_id
    )
