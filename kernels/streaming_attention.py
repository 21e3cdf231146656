"""Exact attention in plain torch over visible (and selected) keys, block by block: forward and backward.

Owns dense and sparse attention for tensors that Triton does not serve; owns no N x N tensor. One function
serves both: an index only narrows the block masks, and blocks without a selected pair are skipped.

    S = Q K^T * scale, masked;  O = softmax(S) V;  LSE = log sum exp S
    backward: P = exp(S - LSE), dV = P^T dO, dS = P (dO V^T - rowsum(dO O)) * scale, dQ = dS K, dK = dS^T Q

Memory is O(block rows x block keys x h) beside the inputs. Work is 4 h d flops a visible pair (forward)
and 10 h d (backward), also for sparse attention: this path saves memory, the Triton kernels save time.
Axes: b batch, s sequence, h query heads, g KV heads, r = h / g heads a KV head, d head dim.
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

NEGATIVE_INFINITY = float("-inf")


def group_heads(query: Tensor, groups: int) -> Tensor:
    """`[b, s, h, d]` -> `[b, g, r, s, d]` in the accumulation precision, heads of one KV head together."""
    b, s, h, d = query.shape
    query = query.to(accumulation_dtype(query.dtype))
    return query.view(b, s, groups, h // groups, d).permute(0, 2, 3, 1, 4)


def key_major(key: Tensor) -> Tensor:
    """`[b, s, g, d]` -> `[b, g, s, d]` contiguous in the accumulation precision."""
    return key.to(accumulation_dtype(key.dtype)).transpose(1, 2).contiguous()


def stacked(grouped: Tensor, rows: slice) -> Tensor:
    """`[b, g, r, s, ...]` -> `[b, g, r * block rows, ...]`: the rows of one matrix product a KV head."""
    return grouped[:, :, :, rows].flatten(2, 3)


def masked_scores(query: Tensor, key: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Scores `[b, g, r * bq, bk]` of one block, -inf where `mask [b, bq, bk]` is false."""
    scores = torch.matmul(query * scale, key.transpose(-1, -2))
    if not bool(mask.all()):
        per_head = scores.unflatten(2, (-1, mask.shape[1]))
        per_head.masked_fill_(~mask[:, None, None], NEGATIVE_INFINITY)
    return scores


def _forward_block(q: Tensor, key: Tensor, value: Tensor, mask: Tensor, key_blocks, first: int, scale: float):
    """One block of query rows over its key blocks: `out [b, g, r * bq, d]` and `lse [b, g, r * bq]`."""
    top = q.new_full(q.shape[:-1], NEGATIVE_INFINITY)
    total, out = torch.zeros_like(top), torch.zeros_like(q)
    for keys in key_blocks:
        part = mask[..., keys.start - first : keys.stop - first]
        if not bool(part.any()):
            continue
        scores = masked_scores(q, key[:, :, keys], part, scale)
        new_top = torch.maximum(top, scores.amax(-1))
        shift = new_top.masked_fill(new_top == NEGATIVE_INFINITY, 0.0)
        weights = scores.sub_(shift[..., None]).exp_()
        keep = torch.exp(top - shift)
        total = total * keep + weights.sum(-1)
        out.mul_(keep[..., None]).add_(torch.matmul(weights, value[:, :, keys]))
        top = new_top
    lse = top + total.log()
    return out / total.masked_fill(total == 0, 1.0)[..., None], lse


class _StreamingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, index, start, end, scale, blocks):
        rows, groups = RowRange(start, end), key.shape[2]
        q, k, v = group_heads(query, groups), key_major(key), key_major(value)
        out = q.new_empty(q.shape)
        lse = q.new_empty(q.shape[:-1])
        for block in query_blocks(rows, key.shape[1], blocks.query):
            mask = block_mask(block, rows, index)
            part, part_lse = _forward_block(
                stacked(q, block.rows), k, v, mask, block.key_blocks(blocks.key), block.key_start, scale
            )
            out[:, :, :, block.rows] = part.unflatten(2, (q.shape[2], -1))
            lse[:, :, :, block.rows] = part_lse.unflatten(2, (q.shape[2], -1))
        out = out.permute(0, 3, 1, 2, 4).flatten(2, 3).to(query.dtype).contiguous()
        lse = lse.flatten(1, 2)
        ctx.save_for_backward(query, key, value, index, start, end, out, lse)
        ctx.scale, ctx.blocks = scale, blocks
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, _grad_lse):
        query, key, value, index, start, end, out, lse = ctx.saved_tensors
        rows, groups = RowRange(start, end), key.shape[2]
        q, k, v = group_heads(query, groups), key_major(key), key_major(value)
        d_out = group_heads(grad_out, groups)
        delta = (d_out * group_heads(out, groups)).sum(-1)
        lse = lse.masked_fill(lse == NEGATIVE_INFINITY, 0.0).unflatten(1, (groups, -1))
        dq, dk, dv = (
            torch.zeros(q.shape, dtype=q.dtype, device=q.device),
            torch.zeros_like(k),
            torch.zeros_like(v),
        )
        for block in query_blocks(rows, key.shape[1], ctx.blocks.query):
            mask = block_mask(block, rows, index)
            q_part, do_part = stacked(q, block.rows), stacked(d_out, block.rows)
            lse_part, delta_part = (stacked(x, block.rows)[..., None] for x in (lse, delta))
            dq_part = torch.zeros_like(q_part)
            for keys in block.key_blocks(ctx.blocks.key):
                part = mask[..., keys.start - block.key_start : keys.stop - block.key_start]
                if not bool(part.any()):
                    continue
                p = masked_scores(q_part, k[:, :, keys], part, ctx.scale).sub_(lse_part).exp_()
                dv[:, :, keys] += torch.matmul(p.transpose(-1, -2), do_part)
                ds = torch.matmul(do_part, v[:, :, keys].transpose(-1, -2)).sub_(delta_part).mul_(p)
                dq_part += torch.matmul(ds, k[:, :, keys])
                dk[:, :, keys] += torch.matmul(ds.transpose(-1, -2), q_part)
            dq[:, :, :, block.rows] = dq_part.unflatten(2, (q.shape[2], -1))
        dq = (dq * ctx.scale).permute(0, 3, 1, 2, 4).flatten(2, 3).to(query.dtype)
        dk, dv = (dk * ctx.scale).transpose(1, 2).to(key.dtype), dv.transpose(1, 2).to(value.dtype)
        return dq, dk, dv, None, None, None, None, None


def streaming_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: RowRange,
    scale: float,
    index: Tensor | None = None,
    blocks: BlockSizes = DEFAULT_BLOCKS,
) -> tuple[Tensor, Tensor]:
    """Attention over the visible, and with `index [b, sq, k]` selected, keys.

    Args:
        query: `[b, sq, h, d]`; key, value: `[b, sk, g, d]`, h a multiple of g.

    Returns:
        `out [b, sq, h, d]`, 0 in empty rows, and `lse [b, h, sq]`, natural log, -inf in empty rows, constant.
    """
    return _StreamingAttention.apply(query, key, value, index, rows.start, rows.end, scale, blocks)
