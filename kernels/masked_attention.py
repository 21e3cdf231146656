"""Sparse attention through a bit mask, as a differentiable torch operator.

Owns the two operators; `union_attention.supported` says which tensors both kinds serve. The meaning is
`reference.attention` with an index. Axes: b batch, sq queries, sk keys, h query heads, g KV heads, d dim.
"""

import torch
from torch import Tensor

from megatron_clsa.kernels import masked_launch as launch
from megatron_clsa.kernels.mask_plan import MaskPlan
from megatron_clsa.kernels.sparse_operator import check_scale, register, rows_contiguous


def masked_attention(query: Tensor, key: Tensor, value: Tensor, plan: MaskPlan, scale: float):
    """`(out [b, sq, h, d], lse [b, h, sq] fp32)`; rows without keys give 0 and -inf. Both differentiable.

    Raises:
        ValueError: `scale` is not positive.
    """
    check_scale(scale)
    return _attend(query, key, value, *plan.flat(), scale)


@torch.library.custom_op("megatron_clsa::masked_attention", mutates_args=())
def _attend(
    query: Tensor, key: Tensor, value: Tensor, tensors: list[Tensor], numbers: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    query, key, value = rows_contiguous(query, key, value)
    tiling = launch.tilings(query.dtype, query.shape[3]).forward
    return launch.forward(query, key, value, MaskPlan.of(tensors, numbers), scale, tiling)


@torch.library.custom_op("megatron_clsa::masked_attention_backward", mutates_args=())
def _attend_backward(
    dout: Tensor,
    dlse: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tensors: list[Tensor],
    numbers: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dout, query, key, value = rows_contiguous(dout, query, key, value)
    plan = MaskPlan.of(tensors, numbers)
    table = launch.tilings(query.dtype, query.shape[3])
    packed = launch.pack(query, key, out, dout, lse, dlse.contiguous(), plan)
    given = packed, key, value, plan, query.shape, scale
    dkey, dvalue = launch.key_gradients(*given, table.key_gradients)
    return launch.query_gradients(*given, table.query_gradients), dkey, dvalue


register(_attend, _attend_backward)
