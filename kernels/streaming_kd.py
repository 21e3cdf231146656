"""The distillation loss of the indexer in plain torch, block by block: forward, backward, and sampled mass.

Owns the cross-entropy of softmax(I) against the attention of this rank's heads; owns no N x N tensor, no mean
over layers, no gradient to the attention. S = index or all visible keys, I = q_idx . k_idx * index_scale:

    ce[t] = sum_h -sum_{j in S} P_h[t, j] log softmax_S(I)[t, j] = sum_j A[t, j] (LSE_S(I)[t] - I[t, j])
    A = sum_h P_h, P_h = exp(scores_h - lse_h);   d ce / d I = H softmax_S(I) - A, linear in A

so gradients add over layers, head shards and pipeline stages. P is recomputed from `lse` in both passes.
Work: 2 h d flops a pair in each pass plus 2 (forward) and 6 (backward) d_idx. Axes as in streaming_attention.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_clsa.kernels.blocks import (
    DEFAULT_BLOCKS,
    BlockSizes,
    accumulation_dtype,
    block_mask,
    query_blocks,
)
from megatron_clsa.kernels.rows import RowRange
from megatron_clsa.kernels.streaming_attention import (
    NEGATIVE_INFINITY,
    group_heads,
    key_major,
    masked_scores,
    stacked,
)


class _Blocks:
    """The inputs in accumulation precision and a walk over (rows, keys, mask, A, I) of every useful block."""

    def __init__(self, query, key, lse, q_idx, k_idx, index, rows: RowRange, scales, sizes: BlockSizes):
        self.q, self.k = group_heads(query, key.shape[2]), key_major(key)
        finite = lse.masked_fill(lse == NEGATIVE_INFINITY, 0.0).to(self.k.dtype)
        self.lse = finite.unflatten(1, (key.shape[2], -1))
        dtype = accumulation_dtype(q_idx.dtype)
        self.q_idx, self.k_idx = q_idx.to(dtype), k_idx.to(dtype)
        self.index, self.rows, self.sizes = index, rows, sizes
        self.scale, self.index_scale = scales

    def __iter__(self):
        for block in query_blocks(self.rows, self.k.shape[2], self.sizes.query):
            mask = block_mask(block, self.rows, self.index)
            q, lse = stacked(self.q, block.rows), stacked(self.lse, block.rows)[..., None]
            for keys in block.key_blocks(self.sizes.key):
                part = mask[..., keys.start - block.key_start : keys.stop - block.key_start]
                if bool(part.any()):
                    yield (
                        block.rows,
                        keys,
                        part,
                        self._target(q, lse, keys, part),
                        self._index_scores(block, keys, part),
                    )

    def _target(self, q: Tensor, lse: Tensor, keys: slice, mask: Tensor) -> Tensor:
        """A of the block, `[b, bq, bk]`: attention probability summed over the local heads."""
        p = masked_scores(q, self.k[:, :, keys], mask, self.scale).sub_(lse).exp_()
        return p.unflatten(2, (-1, mask.shape[1])).sum((1, 2))

    def _index_scores(self, block, keys: slice, mask: Tensor) -> Tensor:
        scores = torch.matmul(
            self.q_idx[:, block.rows] * self.index_scale, self.k_idx[:, keys].transpose(1, 2)
        )
        return scores.masked_fill_(~mask, NEGATIVE_INFINITY)


def _merge_lse(lse: Tensor, scores: Tensor) -> Tensor:
    return torch.logaddexp(lse, torch.logsumexp(scores, -1))


class _StreamingKD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, lse, q_idx, k_idx, index, start, end, scales, sizes):
        blocks = _Blocks(query, key, lse, q_idx, k_idx, index, RowRange(start, end), scales, sizes)
        shape, dtype = q_idx.shape[:2], blocks.q_idx.dtype
        index_lse = torch.full(shape, NEGATIVE_INFINITY, dtype=dtype, device=q_idx.device)
        mass, product = (torch.zeros(shape, dtype=dtype, device=q_idx.device) for _ in range(2))
        for rows, _, mask, target, scores in blocks:
            index_lse[:, rows] = _merge_lse(index_lse[:, rows], scores)
            mass[:, rows] += target.sum(-1)
            product[:, rows] += (target * scores.masked_fill(~mask, 0.0)).sum(-1)
        finite = index_lse.masked_fill(index_lse == NEGATIVE_INFINITY, 0.0)
        ctx.save_for_backward(query, key, lse, q_idx, k_idx, index, start, end, finite)
        ctx.scales, ctx.sizes = scales, sizes
        return mass * finite - product

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, lse, q_idx, k_idx, index, start, end, index_lse = ctx.saved_tensors
        blocks = _Blocks(query, key, lse, q_idx, k_idx, index, RowRange(start, end), ctx.scales, ctx.sizes)
        heads = query.shape[2]
        dq, dk = torch.zeros_like(blocks.q_idx), torch.zeros_like(blocks.k_idx)
        for rows, keys, _, target, scores in blocks:
            softmax = scores.sub_(index_lse[:, rows, None]).exp_()
            d_scores = (softmax.mul_(heads) - target) * (grad[:, rows, None] * ctx.scales[1])
            dq[:, rows] += torch.matmul(d_scores, blocks.k_idx[:, keys])
            dk[:, keys] += torch.matmul(d_scores.transpose(1, 2), blocks.q_idx[:, rows])
        return None, None, None, dq.to(q_idx.dtype), dk.to(k_idx.dtype), *([None] * 5)


def streaming_kd(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    q_idx: Tensor,
    k_idx: Tensor,
    rows: RowRange,
    index: Tensor | None,
    scale: float,
    index_scale: float,
    blocks: BlockSizes = DEFAULT_BLOCKS,
) -> Tensor:
    """`ce [b, sq]`, differentiable in q_idx and k_idx only; 0 in empty rows.

    Args:
        query: `[b, sq, h, d]`; key: `[b, sk, g, d]`; q_idx, k_idx: `[b, sq | sk, d_idx]`.
        lse: `[b, h, sq]` of dense attention, or of sparse attention over the given `index [b, sq, k]`.
    """
    query, key, lse = query.detach(), key.detach(), lse.detach()
    scales = (scale, index_scale)
    return _StreamingKD.apply(query, key, lse, q_idx, k_idx, index, rows.start, rows.end, scales, blocks)
