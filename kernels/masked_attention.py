"""Sparse attention through a bit mask, as a differentiable torch operator.

Owns the operator's registration (fake tensors, autograd); `union_attention.supported` says which tensors both
serve. The meaning is `reference.attention` with an index. Axes: b batch, sq queries, sk keys, h query heads,
g KV heads, d dim.
"""

import torch
from torch import Tensor

from megatron_clsa.kernels import masked_launch as launch
from megatron_clsa.kernels.mask_plan import LiveBlocks, MaskPlan
from megatron_clsa.kernels.union_attention import check_scale


def masked_attention(query: Tensor, key: Tensor, value: Tensor, plan: MaskPlan, scale: float):
    """`(out [b, sq, h, d], lse [b, h, sq] fp32)`; rows without keys give 0 and -inf. Both differentiable.

    Raises:
        ValueError: `scale` is not positive.
    """
    check_scale(scale)
    return _attend(query, key, value, *_flat(plan), scale)


def _flat(plan: MaskPlan):
    """The plan as an operator's arguments."""
    lists = [(part.offsets, part.entries, part.order) for part in (plan.key_blocks, plan.query_tiles)]
    return plan.words, *lists[0], *lists[1], plan.queries


def _plan(words: Tensor, lists: list[Tensor], queries: int) -> MaskPlan:
    return MaskPlan(queries, words, LiveBlocks(*lists[:3]), LiveBlocks(*lists[3:]))


def _rows_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@torch.library.custom_op("megatron_clsa::masked_attention", mutates_args=())
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    words: Tensor,
    block_offsets: Tensor,
    block_entries: Tensor,
    block_order: Tensor,
    tile_offsets: Tensor,
    tile_entries: Tensor,
    tile_order: Tensor,
    queries: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    query, key, value = (_rows_contiguous(x) for x in (query, key, value))
    lists = [block_offsets, block_entries, block_order, tile_offsets, tile_entries, tile_order]
    tiling = launch.tilings(query.dtype, query.shape[3]).forward
    return launch.forward(query, key, value, _plan(words, lists, queries), scale, tiling)


@_attend.register_fake
def _(query, key, value, *plan):
    b, sq, h, _ = query.shape
    return query.new_empty(query.shape), query.new_empty(b, h, sq, dtype=torch.float32)


@torch.library.custom_op("megatron_clsa::masked_attention_backward", mutates_args=())
def _attend_backward(
    dout: Tensor,
    dlse: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    words: Tensor,
    block_offsets: Tensor,
    block_entries: Tensor,
    block_order: Tensor,
    tile_offsets: Tensor,
    tile_entries: Tensor,
    tile_order: Tensor,
    queries: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dout, query, key, value = (_rows_contiguous(x) for x in (dout, query, key, value))
    lists = [block_offsets, block_entries, block_order, tile_offsets, tile_entries, tile_order]
    plan = _plan(words, lists, queries)
    table = launch.tilings(query.dtype, query.shape[3])
    packed = launch.pack(query, key, out, dout, lse, dlse.contiguous(), plan)
    given = packed, key, value, plan, query.shape, scale
    dkey, dvalue = launch.key_gradients(*given, table.key_gradients)
    return launch.query_gradients(*given, table.query_gradients), dkey, dvalue


@_attend_backward.register_fake
def _(dout, dlse, out, lse, query, key, value, *plan):
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx, inputs, output):
    *tensors, ctx.queries, ctx.scale = inputs
    ctx.save_for_backward(*output, *tensors)


def _differentiate(ctx, dout, dlse):
    out, lse, *tensors = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    gradients = _attend_backward(dout, dlse, out, lse, *tensors, ctx.queries, ctx.scale)
    return (*gradients, *[None] * 9)


_attend.register_autograd(_differentiate, setup_context=_keep)
