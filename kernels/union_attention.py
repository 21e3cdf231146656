"""Sparse attention through a union plan, as a differentiable torch operator.

Owns launches, the two operators and the shapes they take. The meaning is
`reference.attention` with an index. Axes: b batch, sq queries, sk keys, h query heads, g KV heads, d dim.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from megatron_clsa.kernels.device import copied_by_16_bytes, on_hopper
from megatron_clsa.kernels.plan import BLOCK, UnionPlan
from megatron_clsa.kernels.sparse_operator import check_scale, register, rows_contiguous
from megatron_clsa.kernels.union_backward import row_products, sum_rows, union_backward
from megatron_clsa.kernels.union_backward_hopper import union_backward_hopper
from megatron_clsa.kernels.union_forward import union_forward

HEAD_DIMS = (16, 32, 64, 128, 256)
LARGEST_GROUP = 32
SUPPORTED = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Launch:
    """Warps of a program and loads in flight; tools/tune_attention.py times others."""

    warps: int
    stages: int


# For 64 rows of at most 128 dims; what is larger takes 8 warps and fewer loads in flight.
FORWARD = Launch(4, 3)
WALK = Launch(4, 1)
SUM_BLOCK, SUM_WARPS = 4, 2  # rows that a program of `sum_rows` reads at once, and its warps
_SUM_WIDTH = 1024  # elements of a row that it reads: dK and dV of several heads lie side by side


def supported(query: Tensor, key: Tensor) -> bool:
    """Whether the kernels serve these tensors."""
    group = query.shape[2] // key.shape[2]
    return query.dtype in SUPPORTED and query.shape[3] in HEAD_DIMS and group <= LARGEST_GROUP


def union_attention(query: Tensor, key: Tensor, value: Tensor, plan: UnionPlan, scale: float):
    """`(out [b, sq, h, d], lse [b, h, sq] fp32)`; rows without keys give 0 and -inf. Both differentiable.

    Raises:
        ValueError: `scale` is not positive.
    """
    check_scale(scale)
    return _attend(query, key, value, *plan.flat(), scale)


def _constants(query: Tensor, key: Tensor, queries: int) -> dict:
    group = query.shape[2] // key.shape[2]
    return {
        "G": group,
        "T": queries,
        "R": max(16, triton.next_power_of_2(queries * group)),
        "D": query.shape[3],
        "BLOCK": BLOCK,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
    }


def _on_hopper(*tensors: Tensor, rows: int) -> bool:
    """Whether the walk for Hopper takes these tensors: half precision, 64 rows, copies of 16 bytes."""
    first = tensors[0]
    return (
        on_hopper(first)
        and first.dtype in (torch.bfloat16, torch.float16)
        and first.shape[3] in (64, 128)
        and rows == 64
        and copied_by_16_bytes(*tensors)
    )


def _descriptor(scratch: Tensor) -> TensorDescriptor:
    """Gradient rows `[p, g, 2, d]` for the bulk copy engine, in blocks of `[BLOCK, d]`."""
    rows, block = scratch.flatten(1), [BLOCK, scratch.shape[3]]
    element = gl.bfloat16 if scratch.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(block, element)
    return TensorDescriptor.from_tensor(rows, block, layout)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


@torch.library.custom_op("megatron_clsa::union_attention", mutates_args=())
def _attend(
    query: Tensor, key: Tensor, value: Tensor, tensors: list[Tensor], numbers: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    plan = UnionPlan.of(tensors, numbers)
    query, key, value = rows_contiguous(query, key, value)
    b, sq, h, _ = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(b, h, sq, dtype=torch.float32, device=query.device)
    constants = _constants(query, key, plan.queries)
    launch = FORWARD if constants["R"] * constants["D"] <= 64 * 128 else Launch(8, 2)
    union_forward[(plan.order.numel(), key.shape[2])](
        query, key, value, plan.keys, plan.members, plan.offsets, plan.order, out, lse, scale,
        triton.cdiv(sq, plan.queries), sq, *_strides(query, key, value),
        STAGES=launch.stages, num_warps=launch.warps, **constants,
    )  # fmt: skip
    return out, lse


@torch.library.custom_op("megatron_clsa::union_attention_backward", mutates_args=())
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
    plan = UnionPlan.of(tensors, numbers)
    dout, query, key, value = rows_contiguous(dout, query, key, value)
    (b, sq, h, d), (_, sk, g, _) = query.shape, key.shape
    delta = torch.empty(b, h, sq, dtype=torch.float32, device=query.device)
    row_products[(b * h, triton.cdiv(sq, 64))](out, dout, delta, sq, h, *_strides(out, dout), D=d, BLOCK=64)
    delta -= dlse  # d lse / d score is the probability itself
    dquery = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    total = torch.empty(b, sk, g, 2, d, dtype=torch.float32, device=query.device)
    constants = _constants(query, key, plan.queries)
    # At least a block: an index that selects nothing would ask for a descriptor of no rows.
    widest = max(BLOCK, *(chunk.rows[1] - chunk.rows[0] for chunk in plan.chunks))
    scratch = torch.empty(widest, g, 2, d, dtype=query.dtype, device=query.device)
    together = math.gcd(g, max(1, _SUM_WIDTH // (2 * d)))  # powers of two: the dims are
    if _on_hopper(query, key, value, dout, rows=constants["R"]):
        walk, rows, options = union_backward_hopper, _descriptor(scratch), {"num_warps": 4}
        del constants["PRECISION"]  # of fp32 products
    else:
        walk, rows = union_backward, scratch
        launch = WALK if constants["R"] * constants["D"] <= 64 * 128 else Launch(8, 1)
        options = {"STAGES": launch.stages, "num_warps": launch.warps}
    walk_plan = plan.keys, plan.members, plan.offsets
    walked = (query, key, value, dout, *walk_plan, lse, delta, dquery, rows, scale)
    shape = (triton.cdiv(sq, plan.queries), sq, *_strides(query, key, value, dout))
    for chunk in plan.chunks:
        (t0, t1), (p0, _) = chunk.tiles, chunk.rows
        walk[(t1 - t0, g)](*walked, t1, p0, *shape, **options, **constants)
        sum_rows[(b * sk, g // together)](
            scratch, chunk.key_offsets, chunk.entries, total, FIRST=chunk is plan.chunks[0],
            WIDTH=together * 2 * d, BLOCK=SUM_BLOCK, num_warps=SUM_WARPS,
        )  # fmt: skip
    dkey, dvalue = (part.to(key.dtype, copy=True) for part in total.unbind(3))
    return dquery, dkey, dvalue


register(_attend, _attend_backward)
