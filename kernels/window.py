"""Sliding-window attention through torch's SDPA: query blocks folded into the batch, work O(sq x window).

Owns the folding; owns no softmax. Rows whose positions do not advance by one a row within each half of the
call (the two zigzag pieces of a context-parallel shard) go to the streaming kernel, which takes any rows.

    keys     [ block -1 | block 0 | block 1 | ... ]      each block of B >= window queries sees itself and the
    queries             [ block 0 | block 1 | ... ]      one before it: 2B keys, masked to start..end
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_clsa.kernels.rows import RowRange
from megatron_clsa.kernels.streaming_attention import streaming_attention

MINIMUM_BLOCK = 64


def _uniform_offset(rows: RowRange) -> int | None:
    """`end[b, i] - i` if it is one number for all rows, else None."""
    steps = torch.arange(rows.end.shape[1], device=rows.end.device, dtype=rows.end.dtype)
    offsets = rows.end - steps
    low, high = torch.stack(torch.aminmax(offsets)).tolist()
    return low if low == high else None


def _fold(x: Tensor, first: int, length: int) -> Tensor:
    """Rows `first..first+length-1` of `[b, s, ...]`, zeros where they lie outside."""
    lead, tail = max(-first, 0), max(first + length - x.shape[1], 0)
    inside = x[:, max(first, 0) : max(first + length, 0)]
    return F.pad(inside, (0, 0) * (x.dim() - 2) + (lead, tail)) if lead or tail else inside


def _folded_mask(rows: RowRange, block: int, count: int, offset: int, num_keys: int) -> Tensor:
    """`[b, count, B, 2B]` bool; row i of block n is at `offset + n B + i`, its keys start B before that."""
    length = count * block
    start = F.pad(rows.start, (0, length - rows.start.shape[1]), value=num_keys).unflatten(1, (count, block))
    end = F.pad(rows.end, (0, length - rows.end.shape[1]), value=-1).unflatten(1, (count, block))
    device = start.device
    base = offset + block * (torch.arange(count, device=device) - 1)
    position = (base[:, None] + torch.arange(2 * block, device=device))[:, None]
    inside = (position >= 0) & (position < num_keys)
    return inside & (position >= start[..., None]) & (position <= end[..., None])


def _folded_attention(query, key, value, rows: RowRange, window: int, offset: int, scale: float) -> Tensor:
    b, sq, h, d = query.shape
    block = min(max(window, MINIMUM_BLOCK), max(sq, window))
    count = -(-sq // block)
    mask = _folded_mask(rows, block, count, offset, key.shape[1])
    empty = ~mask.any(-1, keepdim=True)
    mask = (mask | empty).flatten(0, 1)[:, None]

    def blocks_of(x: Tensor) -> Tensor:
        """`[b, count B, heads, d]` -> `[b count, heads, B, d]`."""
        return x.reshape(b * count, block, *x.shape[2:]).transpose(1, 2)

    def keys_of(x: Tensor) -> Tensor:
        x = _fold(x, offset - block, (count + 1) * block)
        pairs = [x[:, : count * block], x[:, block:]]
        return torch.cat([blocks_of(half) for half in pairs], dim=2)

    out = F.scaled_dot_product_attention(
        blocks_of(_fold(query, 0, count * block)),
        keys_of(key),
        keys_of(value),
        attn_mask=mask,
        scale=scale,
        enable_gqa=h != key.shape[2],
    )
    out = out.masked_fill(empty.flatten(0, 1)[:, None], 0.0)
    return out.transpose(1, 2).reshape(b, count * block, h, d)[:, :sq]


def window_attention(query, key, value, rows: RowRange, window: int, scale: float) -> Tensor:
    """Attention of `query [b, sq, h, d]` over at most `window` keys a row; returns `[b, sq, h, d]`.

    Args:
        key, value: `[b, sk, g, d]`; position p of `rows` is row p here.
        rows: start already limited to the window (`RowRange.windowed`).
    """
    offset = _uniform_offset(rows)
    if offset is not None:
        return _folded_attention(query, key, value, rows, window, offset, scale)
    half = query.shape[1] // 2
    pieces = [RowRange(rows.start[:, part], rows.end[:, part]) for part in (slice(half), slice(half, None))]
    offsets = [_uniform_offset(piece) for piece in pieces] if half else [None]
    if None in offsets:
        return streaming_attention(query, key, value, rows, scale)[0]
    queries = (query[:, :half], query[:, half:])
    outs = [
        _folded_attention(q, key, value, piece, window, offset, scale)
        for q, piece, offset in zip(queries, pieces, offsets, strict=True)
    ]
    return torch.cat(outs, 1)
