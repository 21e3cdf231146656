"""The distillation loss of the indexer on GPUs, `full` and `selected`: value, dq_idx and dk_idx in one sweep.

Owns the torch operators and their autograd; the meaning is in `reference.py`. Tiles of all pairs are launched
by `kd_launch.py` (kernels in `kd_sweep.py`); where the index comes with a union plan, its tiles of gathered
keys by `kd_union_launch.py` (`kd_union.py`). The gradient of the scores, d = H softmax(I) - sum_h P_h, needs
every head's probabilities, the costly part; so the value and both gradients come from one sweep, in the
forward pass. dq_idx of a row scales with the row's upstream gradient afterwards, but dk_idx sums over rows:
`kd_sum` is told the rows' weights and returns the weighted sum, whose upstream gradient is one number;
`kd_rows` returns rows and sweeps a second time in its backward. Without gradient neither keeps anything.

Axes: b batch, sq queries, sk keys, h heads, g KV heads, d head dim, di index dim, k selected.
"""

import torch
from torch import Tensor

from megatron_clsa.kernels import kd_union_launch
from megatron_clsa.kernels.kd_launch import LOG2E, Inputs, Sweep, Tiles, default_tiles
from megatron_clsa.kernels.plan import UnionPlan
from megatron_clsa.kernels.rows import RowRange

SUPPORTED = (torch.float32, torch.bfloat16, torch.float16)


def supported(query: Tensor, key: Tensor, q_idx: Tensor) -> bool:
    """Whether the kernels serve these tensors; everything else goes to the plain-torch path."""
    d, di, size = query.shape[-1], q_idx.shape[-1], q_idx.element_size()
    return (
        query.is_cuda
        and query.dtype == key.dtype == q_idx.dtype
        and query.dtype in SUPPORTED
        and d in (16, 32, 64, 128, 256)
        and di <= 256
        and di * size % 16 == 0
        and query.shape[1] > 0
        and torch.cuda.get_device_capability(query.device)[0] >= 9
    )


def run_sweep(
    query, key, lse, q_idx, k_idx, rows: RowRange, index, weight, scale, index_scale, want_dq: bool,
    tiles: Tiles | None = None, plan: UnionPlan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """fp32 ce `[b, sq]`, dq `[b, sq, di]` of plain rows, dk `[b, sk, di]` of rows times `weight [b, sq]`.

    dq has no rows unless wanted, dk none without a weight. A plan says what an index would.
    """
    lse = (lse.float() * LOG2E).masked_fill(lse == float("-inf"), float("inf")).contiguous()
    query, key, q_idx, k_idx = (x.contiguous() for x in (query, key, q_idx, k_idx))
    rows = RowRange(rows.start.contiguous(), rows.end.contiguous())
    inputs = Inputs(query, key, lse, q_idx, k_idx, rows, index, scale, index_scale)
    if plan is not None:
        launch = kd_union_launch.default_launch(query)
        return kd_union_launch.UnionSweep(inputs, plan, weight, want_dq, launch).run()
    return Sweep(inputs, weight, want_dq, tiles or default_tiles(query, q_idx)).run()


def _kept(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """What waits for the backward pass: bf16 has fp32's range, fp16 would lose small gradients."""
    return gradient.to(torch.bfloat16) if dtype == torch.bfloat16 else gradient


def _empty_gradients(q_idx: Tensor, k_idx: Tensor, want_dq: bool, want_dk: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.bfloat16 if q_idx.dtype == torch.bfloat16 else torch.float32
    shapes = ((q_idx, want_dq), (k_idx, want_dk))
    return tuple(
        x.new_empty(x.shape[0], x.shape[1] if wanted else 0, x.shape[2], dtype=dtype) for x, wanted in shapes
    )


@torch.library.custom_op("megatron_clsa::kd_sum", mutates_args=())
def _kd_sum(
    query: Tensor, key: Tensor, lse: Tensor, q_idx: Tensor, k_idx: Tensor, start: Tensor, end: Tensor,
    index: Tensor | None, plan: list[Tensor], numbers: list[int], weight: Tensor, scale: float,
    index_scale: float, gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The weighted sum of ce over all rows, and its gradients."""
    ce, dq, dk = run_sweep(
        query, key, lse, q_idx, k_idx, RowRange(start, end), index, weight if gradient else None,
        scale, index_scale, gradient, plan=_plan(plan, numbers),
    )  # fmt: skip
    if gradient:
        dq.mul_(weight[..., None])
    total = (ce * weight).masked_fill(weight == 0, 0.0).sum()
    return total, _kept(dq, q_idx.dtype), _kept(dk, q_idx.dtype)


@_kd_sum.register_fake
def _(query, key, lse, q_idx, k_idx, start, end, index, plan, numbers, weight, scale, index_scale, gradient):
    total = q_idx.new_empty((), dtype=torch.float32)
    return total, *_empty_gradients(q_idx, k_idx, gradient, gradient)


def _save_sum(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], output[2])
    ctx.dtype, ctx.plan = inputs[3].dtype, [None] * len(inputs[8])


def _sum_backward(ctx, grad, _dq, _dk):
    dq = dk = None
    if grad is not None:
        dq, dk = ((x * grad).to(ctx.dtype) for x in ctx.saved_tensors)
    return None, None, None, dq, dk, None, None, None, ctx.plan, *([None] * 5)


_kd_sum.register_autograd(_sum_backward, setup_context=_save_sum)


@torch.library.custom_op("megatron_clsa::kd_rows", mutates_args=())
def _kd_rows(
    query: Tensor, key: Tensor, lse: Tensor, q_idx: Tensor, k_idx: Tensor, start: Tensor, end: Tensor,
    index: Tensor | None, plan: list[Tensor], numbers: list[int], scale: float, index_scale: float,
    gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """ce of every row, and its gradient to the row's q_idx."""
    ce, dq, _ = run_sweep(
        query, key, lse, q_idx, k_idx, RowRange(start, end), index, None, scale, index_scale, gradient,
        plan=_plan(plan, numbers),
    )  # fmt: skip
    return ce, _kept(dq, q_idx.dtype)


@_kd_rows.register_fake
def _(query, key, lse, q_idx, k_idx, start, end, index, plan, numbers, scale, index_scale, gradient):
    ce = q_idx.new_empty(q_idx.shape[:2], dtype=torch.float32)
    return ce, _empty_gradients(q_idx, k_idx, gradient, False)[0]


@torch.library.custom_op("megatron_clsa::kd_keys", mutates_args=())
def _kd_keys(
    query: Tensor, key: Tensor, lse: Tensor, q_idx: Tensor, k_idx: Tensor, start: Tensor, end: Tensor,
    index: Tensor | None, plan: list[Tensor], numbers: list[int], weight: Tensor, scale: float,
    index_scale: float,
) -> Tensor:  # fmt: skip
    """dk_idx of the sum of ce times `weight [b, sq]`, scaled to 1 meanwhile: fp16 would underflow."""
    largest = weight.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    rows = RowRange(start, end)
    _, _, dk = run_sweep(
        query, key, lse, q_idx, k_idx, rows, index, weight / largest, scale, index_scale, False,
        plan=_plan(plan, numbers),
    )  # fmt: skip
    return (dk * largest).to(k_idx.dtype)


@_kd_keys.register_fake
def _(query, key, lse, q_idx, k_idx, start, end, index, plan, numbers, weight, scale, index_scale):
    return torch.empty_like(k_idx, memory_format=torch.contiguous_format)


def _save_rows(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    *tensors, plan, ctx.numbers, ctx.scale, ctx.index_scale, _ = inputs
    ctx.save_for_backward(output[1], *tensors, *plan)


def _rows_backward(ctx, grad, _dq):
    rows_dq, *tensors = ctx.saved_tensors
    tensors, plan = tensors[:8], tensors[8:]
    dq = dk = None
    if grad is not None:
        dk = _kd_keys(*tensors, plan, ctx.numbers, grad.float(), ctx.scale, ctx.index_scale)
        dq = (rows_dq * grad[..., None]).to(dk.dtype)
    return None, None, None, dq, dk, None, None, None, [None] * len(plan), *([None] * 4)


_kd_rows.register_autograd(_rows_backward, setup_context=_save_rows)


def _needs_gradient(q_idx: Tensor, k_idx: Tensor) -> bool:
    return torch.is_grad_enabled() and (q_idx.requires_grad or k_idx.requires_grad)


def _arguments(query, key, lse, q_idx, k_idx, rows: RowRange, index, plan: UnionPlan | None):
    """What all operators begin with. A plan takes the index's place."""
    tensors, numbers = plan.flat() if plan is not None else ([], [0])  # torch takes [] for tensors
    index = None if plan is not None else index
    detached = query.detach(), key.detach(), lse.detach()
    return *detached, q_idx, k_idx, rows.start, rows.end, index, tensors, numbers


def _plan(tensors: list[Tensor], numbers: list[int]) -> UnionPlan | None:
    return UnionPlan.of(tensors, numbers) if tensors else None


def triton_kd(
    query, key, lse, q_idx, k_idx, rows: RowRange, index, scale: float, index_scale: float,
    plan: UnionPlan | None = None,
) -> Tensor:  # fmt: skip
    """`ce [b, sq]` as `streaming_kd.streaming_kd`, differentiable in q_idx and k_idx only.

    With the `plan` of the index only the keys of its unions are read.
    """
    arguments = _arguments(query, key, lse, q_idx, k_idx, rows, index, plan)
    return _kd_rows(*arguments, scale, index_scale, _needs_gradient(q_idx, k_idx))[0]


def triton_kd_sum(
    query, key, lse, q_idx, k_idx, rows: RowRange, index, weight: Tensor, scale: float, index_scale: float,
    plan: UnionPlan | None = None,
) -> Tensor:  # fmt: skip
    """Sum over rows of `weight [b, sq]` times ce: half the work of `triton_kd` when gradients are asked."""
    arguments = _arguments(query, key, lse, q_idx, k_idx, rows, index, plan)
    gradient = _needs_gradient(q_idx, k_idx)
    return _kd_sum(*arguments, weight.detach().float(), scale, index_scale, gradient)[0]
