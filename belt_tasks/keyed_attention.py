"""Attention with keyed dropout, a block of heads at a time.

Weights of attention are the largest numbers of a fine-tuning step: S^2 for every head. Here a block of them lies in a
buffer that fits a processor's cache, is used, and is overwritten by the next one's; for the gradient it is made again,
dropped numbers and all. That is the idea of FlashAttention (Dao et al. 2022, arXiv 2205.14135), by heads instead of
tiles, with PyTorch's own products.

Shape letters: B chunks, N heads, S tokens of a chunk, H numbers of a head, G heads of a block.
"""

from typing import Any

import torch
from torch import Tensor

from belt_tasks import dropout_mask

Block = tuple[slice, slice]
"""Chunks, and heads of these."""

_BLOCK_BYTES = 4 * 2**20  # of weights: a block is read and written some ten times while it is in a cache
_CUDA_BLOCK_BYTES = 256 * 2**20  # enough for all of a GPU to work on


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, key_BNS: Tensor, p: float) -> Tensor:
    """Attention that drops weights by the keys of their rows.

    Args:
        query: [B, N, S, H], already scaled.
        key: [B, N, S, H].
        value: [B, N, S, H], where H may be another.
        mask: broadcasts to [B, N, S, S]: bool, true where a token is seen, or float, added to the scores.
        key_BNS: of the rows of weights, int64.
        p: from 0 to 1, the share of weights that is dropped.

    Returns:
        [B, N, S, H] in the dtype of `value`. Weights are float32 or wider between the products; a row whose mask
        shows it nothing sees all alike.
    """
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
    return _Attention.apply(query, key, value, mask, key_BNS, p)  # type: ignore[no-any-return, no-untyped-call]


class _Attention(torch.autograd.Function):
    """See `attend`."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        key_BNS: Tensor,
        p: float,
    ) -> Tensor:
        output = _like_by_tokens(value)
        with torch.autocast(query.device.type, enabled=False):
            weights = _Weights(query, key, mask)
            for block in weights.blocks:
                weight_GSS = dropout_mask.drop_(weights.of(block), _rows(key_BNS, block), p)
                _put(output, block, weight_GSS.to(value.dtype) @ _heads(value, block))
        ctx.save_for_backward(query, key, value, mask, key_BNS, output)
        ctx.p = p
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - autograd's
        query, key, value, mask, key_BNS, output = ctx.saved_tensors
        of_query, of_key, of_value = _like_by_tokens(query), _like_by_tokens(key), _like_by_tokens(value)
        with torch.autocast(query.device.type, enabled=False):
            weights = _Weights(query, key, mask)
            of_mask = torch.zeros_like(mask, dtype=weights.dtype) if ctx.needs_input_grad[3] else None
            for block in weights.blocks:
                row_keys, of_output_GSH = _rows(key_BNS, block), _heads(gradients[0], block)
                weight_GSS = weights.of(block)
                dropped_GSS = dropout_mask.drop_(weights.scratch(block).copy_(weight_GSS), row_keys, ctx.p)
                _put(of_value, block, dropped_GSS.to(value.dtype).mT @ of_output_GSH)
                of_weight_GSS = _product(of_output_GSH, _heads(value, block).mT, weights.scratch(block))
                dropout_mask.drop_(of_weight_GSS, row_keys, ctx.p)
                # what a softmax takes from a row's gradient: with weights dropped or not, output times its gradient
                share_GS1 = (of_output_GSH.to(weights.dtype) * _heads(output, block)).sum(dim=-1, keepdim=True)
                of_score_GSS = of_weight_GSS.sub_(share_GS1).mul_(weight_GSS)
                if of_mask is not None:
                    part = _of_block(of_mask, block)
                    part += of_score_GSS.view(weights.shape(block)).sum_to_size(part.shape)
                of_score_GSS = of_score_GSS.to(query.dtype)
                _put(of_query, block, of_score_GSS @ _heads(key, block))
                _put(of_key, block, of_score_GSS.mT @ _heads(query, block))
        return of_query, of_key, of_value, None if of_mask is None else of_mask.to(mask.dtype), None, None


class _Weights:
    """Weights of attention [G, S, S], of one block at a time, in memory that the next block uses again."""

    def __init__(self, query: Tensor, key: Tensor, mask: Tensor | None) -> None:
        self._query, self._key = query, key
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self._added = None if mask is None or mask.dtype == torch.bool else mask
        self._is_blocked = None if mask is None or mask.dtype != torch.bool else ~mask
        self._has_blocked = [True] * query.shape[0]
        if self._is_blocked is not None and query.device.type == "cpu":  # elsewhere asking takes longer than masking
            self._has_blocked = self._is_blocked.flatten(1).any(dim=1).expand(query.shape[0]).tolist()
        num_chunks, num_heads, num_rows, _ = query.shape
        self._num_columns = key.shape[2]
        per_head = num_rows * self._num_columns * self.dtype.itemsize
        most = max(1, (_CUDA_BLOCK_BYTES if query.device.type == "cuda" else _BLOCK_BYTES) // max(1, per_head))
        heads, chunks = min(most, num_heads), max(1, min(most // num_heads, num_chunks))
        self.blocks: list[Block] = [
            (slice(chunk, min(chunk + chunks, num_chunks)), slice(head, min(head + heads, num_heads)))
            for chunk in range(0, num_chunks, chunks)
            for head in range(0, num_heads, heads)
        ]
        self._memory = query.new_empty(2, chunks * heads * num_rows * self._num_columns, dtype=self.dtype)

    def of(self, block: Block) -> Tensor:
        """[G, S, S], until the next call."""
        score_GSS = _product(_heads(self._query, block), _heads(self._key, block).mT, self._part(0, block))
        score_BNSS = score_GSS.view(self.shape(block))
        least = torch.finfo(self._query.dtype).min  # not infinite: a padded token may see no token at all
        if self._is_blocked is not None and any(self._has_blocked[block[0]]):
            score_BNSS.masked_fill_(_of_block(self._is_blocked, block), least)
        if self._added is not None:
            score_BNSS.add_(_of_block(self._added, block).clamp_min(least))
        return torch.softmax(score_GSS, dim=-1, out=score_GSS)

    def scratch(self, block: Block) -> Tensor:
        """As much memory again, [G, S, S]."""
        return self._part(1, block)

    def shape(self, block: Block) -> tuple[int, int, int, int]:
        """[B, N, S, S] of a block."""
        chunks, heads = block
        return chunks.stop - chunks.start, heads.stop - heads.start, self._query.shape[2], self._num_columns

    def _part(self, which: int, block: Block) -> Tensor:
        num_chunks, num_heads, num_rows, num_columns = self.shape(block)
        size = num_chunks * num_heads * num_rows * num_columns
        return self._memory[which, :size].view(num_chunks * num_heads, num_rows, num_columns)


def _product(left: Tensor, right: Tensor, output: Tensor) -> Tensor:
    """Their product, put into memory that may have a wider dtype."""
    if left.dtype == output.dtype:
        return torch.bmm(left, right, out=output)
    return output.copy_(left @ right)


def _heads(values: Tensor, block: Block) -> Tensor:
    """[G, S, H] of a block."""
    return values[block].flatten(0, 1)


def _rows(key_BNS: Tensor, block: Block) -> Tensor:
    return key_BNS[block].flatten()


def _put(output: Tensor, block: Block, values_GSH: Tensor) -> None:
    part = output[block]
    part.copy_(values_GSH.view(part.shape))


def _of_block(mask: Tensor, block: Block) -> Tensor:
    """A mask's part of a block: all where it has only one."""
    chunks, heads = block
    return mask[chunks if mask.shape[0] > 1 else slice(None), heads if mask.shape[1] > 1 else slice(None)]


def _like_by_tokens(values: Tensor) -> Tensor:
    """Not filled, [B, N, S, H], which lies in memory as [B, S, N, H]: as the layers before and behind want it."""
    num_chunks, num_heads, num_tokens, size = values.shape
    return values.new_empty(num_chunks, num_tokens, num_heads, size).transpose(1, 2)
