"""Exact top-k positions in plain torch, one block of query rows at a time.

Owns the order (fp32 score, then smaller position) on tensors that Triton does not serve. The largest tensor
is block rows x sk scores, never sq x sk. Reference: `reference.topk_index`.
"""

import torch
from torch import Tensor

from megatron_clsa.kernels.blocks import (
    DEFAULT_BLOCKS,
    QueryBlock,
    accumulation_dtype,
    block_mask,
    query_blocks,
)
from megatron_clsa.kernels.rows import RowRange


def select_exact(scores: Tensor, visible: Tensor, k: int) -> Tensor:
    """`[..., n]` bool: the k largest visible scores of each row, ties to the smaller position.

    A value threshold from `topk` and a count of the ties that still fit: `topk` itself leaves ties undefined.
    """
    if scores.shape[-1] <= k:
        return visible
    scores = scores.masked_fill(~visible | scores.isnan(), float("-inf"))
    threshold = scores.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above = scores > threshold
    tied = (scores == threshold) & visible
    room = k - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1) <= room))


def ascending_positions(chosen: Tensor, k: int, first: int) -> Tensor:
    """`[b, rows, k]` int32: positions of the true entries plus `first`, ascending, -1 after them."""
    index = torch.full((*chosen.shape[:2], k), -1, dtype=torch.int32, device=chosen.device)
    batch, row, position = chosen.nonzero(as_tuple=True)
    slot = chosen.cumsum(-1)[batch, row, position] - 1
    index[batch, row, slot] = (position + first).to(torch.int32)
    return index


def _block_index(q_idx: Tensor, k_idx: Tensor, rows: RowRange, block: QueryBlock, k: int) -> Tensor:
    visible = block_mask(block, rows, None)
    keys = k_idx[:, block.key_start : max(block.key_stop, block.key_start)]
    scores = torch.matmul(q_idx[:, block.rows], keys.transpose(1, 2))
    return ascending_positions(select_exact(scores, visible, k), k, block.key_start)


@torch.no_grad()
def streaming_topk(
    q_idx: Tensor, k_idx: Tensor, rows: RowRange, k: int, block_rows: int = DEFAULT_BLOCKS.query
) -> Tensor:
    """`[b, sq, k]` int32 positions of the k best visible keys of `q_idx [b, sq, di] . k_idx [b, sk, di]`."""
    dtype = accumulation_dtype(q_idx.dtype)
    q_idx, k_idx = q_idx.to(dtype), k_idx.to(dtype)
    blocks = query_blocks(rows, k_idx.shape[1], block_rows)
    parts = [_block_index(q_idx, k_idx, rows, block, k) for block in blocks]
    if not parts:
        return torch.empty(*q_idx.shape[:2], k, dtype=torch.int32, device=q_idx.device)
    return torch.cat(parts, 1)
