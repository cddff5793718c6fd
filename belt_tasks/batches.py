"""Mini-batches of chunks: which chunks share a forward, and the padded tensors they become.

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
    """B chunks padded to the longest, T tokens."""

    rows_B: Int64
    """Where each chunk's output belongs among the C chunks."""
    input_ids_BT: Tensor
    """int64."""
    attention_mask_BT: Tensor
    """int64: 1 for content and special tokens, 0 for padding."""

    def __len__(self) -> int:
        return len(self.rows_B)


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
    """Build the padded tensors of one mini-batch.

    Args:
        rows_B: chunks to take, as row numbers of `windows`.
        input_ids_T: content tokens of all documents, one after the other.
        windows: C windows.
        first_token_D: where each document of `windows` begins in `input_ids_T`.
        special: tokens to put around and behind the content.
    """
    base_B = first_token_D[windows.doc_of_chunk_C[rows_B]]
    start_B, stop_B = base_B + windows.start_C[rows_B], base_B + windows.stop_C[rows_B]
    longest = int((stop_B - start_B).max()) + special.num_tokens
    input_ids_BT = np.full((len(rows_B), longest), special.pad_id, dtype=np.int64)
    attention_mask_BT = np.zeros((len(rows_B), longest), dtype=np.int64)
    prefix = len(special.prefix_ids)
    for row, (start, stop) in enumerate(zip(start_B, stop_B, strict=True)):
        content = stop - start
        input_ids_BT[row, :prefix] = special.prefix_ids
        input_ids_BT[row, prefix : prefix + content] = input_ids_T[start:stop]
        input_ids_BT[row, prefix + content : content + special.num_tokens] = special.suffix_ids
        attention_mask_BT[row, : content + special.num_tokens] = 1
    return MiniBatch(
        rows_B=rows_B,
        input_ids_BT=torch.from_numpy(input_ids_BT),
        attention_mask_BT=torch.from_numpy(attention_mask_BT),
    )
