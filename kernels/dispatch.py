"""The kernel interface that the model calls; picks the implementation that serves the given tensors.

Owns the choice and the argument checks; owns no arithmetic. Tensors are `[b, s, h, d]`, keys in global order,
and which of them a query sees is told by `RowRange` alone. Axes: b batch, s sequence (sq queries, sk keys),
h query heads, g KV heads, d head dim, k selected. Every entry raises ValueError where there is no query.
"""

from torch import Tensor

from megatron_clsa.kernels import cudnn, flash, indexer_kd, indexer_topk, masked_attention, union_attention
from megatron_clsa.kernels import streaming_kd as _kd
from megatron_clsa.kernels import window as _window
from megatron_clsa.kernels.mask_plan import MaskPlan
from megatron_clsa.kernels.plan import UnionPlan
from megatron_clsa.kernels.rows import RowRange
from megatron_clsa.kernels.sparse_choice import Kernel, make_plan
from megatron_clsa.kernels.streaming_attention import streaming_attention
from megatron_clsa.kernels.streaming_topk import streaming_topk


def _check_queries(rows: RowRange) -> None:
    """Refuse what the implementations would meet in different ways: no sequence, or none of its queries."""
    if rows.end.numel() == 0:
        raise ValueError(f"rows [b, sq] of {list(rows.end.shape)}: attention needs at least one query")


def topk_index(q_idx: Tensor, k_idx: Tensor, rows: RowRange, k: int) -> Tensor:
    """`[b, sq, k]` int32: the k visible keys with the largest `q_idx [b, sq, di] . k_idx [b, sk, di]`.

    Scores are compared in fp32, ties go to the smaller position, positions ascend, -1 fills rows that see
    fewer than k keys. No gradient.
    """
    _check_queries(rows)
    if indexer_topk.supported(q_idx, k):
        return indexer_topk.triton_topk(q_idx, k_idx, rows, k)
    return streaming_topk(q_idx, k_idx, rows, k)


def dense_attention(query, key, value, rows: RowRange, scale: float) -> tuple[Tensor, Tensor]:
    """Attention over all visible keys: `(out [b, sq, h, d], lse [b, h, sq])`, lse in natural log.

    No gradient flows through the LSE on a GPU.
    """
    _check_queries(rows)
    if cudnn.supported(query, key, rows):
        return cudnn.cudnn_attention(query, key, value, scale)
    if flash.supported(query, rows, key.shape[1]):
        return flash.flash_attention(query, key, value, rows, scale)
    return streaming_attention(query, key, value, rows, scale)


def build_plan(
    index: Tensor, rows: RowRange, num_keys: int, group_size: int, kernel: Kernel = "auto", distilled=False
) -> UnionPlan | MaskPlan | None:
    """What sparse attention derives from `index [b, sq, k]`, once a microbatch.

    `group_size` is the query heads a KV head; `kernel` names the implementation whose plan it is, `auto`
    takes the one that `sparse_choice` finds faster, with `attention_kd` over the plan if `distilled`. None
    where the plain-torch path serves, which needs nothing.
    """
    _check_queries(rows)
    if not index.is_cuda:
        return None
    return make_plan(index, rows, num_keys, group_size, kernel, distilled)


def sparse_attention(
    query, key, value, index, rows: RowRange, scale: float, plan=None
) -> tuple[Tensor, Tensor]:
    """Attention over `index [b, sq, k]` (-1 ignored): `(out [b, sq, h, d], lse [b, h, sq])`."""
    _check_queries(rows)
    if plan is not None and union_attention.supported(query, key):
        if isinstance(plan, MaskPlan):
            return masked_attention.masked_attention(query, key, value, plan, scale)
        return union_attention.union_attention(query, key, value, plan, scale)
    return streaming_attention(query, key, value, rows, scale, index)


def window_attention(query, key, value, rows: RowRange, window: int, scale: float) -> Tensor:
    """Attention over at most `window` keys a row; `rows.start` already includes the window."""
    _check_queries(rows)
    if flash.supported(query, rows, key.shape[1]):
        return flash.flash_attention(query, key, value, rows, scale, window)[0]
    return _window.window_attention(query, key, value, rows, window, scale)


def _union_plan(index: Tensor | None, plan) -> UnionPlan | None:
    """The plan, if it is one whose tiles the distillation can walk; masked tiles are no help to it."""
    return plan if index is not None and isinstance(plan, UnionPlan) else None


def attention_kd(
    query, key, lse, q_idx, k_idx, rows: RowRange, index: Tensor | None, scale, index_scale, plan=None
) -> Tensor:
    """`ce [b, sq]`: cross-entropy of the indexer's softmax against each local head's attention, summed.

    Without an index both softmaxes run over all visible keys (`lse` of dense attention); with one, over the
    selected keys (`lse` of sparse attention), for which a union `plan` of the index saves reading the others.
    Gradient flows to q_idx and k_idx only.
    """
    _check_queries(rows)
    arguments = query, key, lse, q_idx, k_idx, rows, index, scale, index_scale
    if indexer_kd.supported(query, key, q_idx):
        return indexer_kd.triton_kd(*arguments, _union_plan(index, plan))
    return _kd.streaming_kd(*arguments)


def attention_kd_sum(
    query, key, lse, q_idx, k_idx, rows: RowRange, index: Tensor | None, counted: Tensor, scale, index_scale,
    plan=None,
) -> Tensor:  # fmt: skip
    """Scalar: `attention_kd` summed over the rows `counted [b, sq]` (bool).

    Knowing which rows count, the GPU kernels make value and gradients from one sweep instead of two.
    """
    _check_queries(rows)
    if indexer_kd.supported(query, key, q_idx):
        return indexer_kd.triton_kd_sum(
            query, key, lse, q_idx, k_idx, rows, index, counted, scale, index_scale, _union_plan(index, plan)
        )
    rows_ce = _kd.streaming_kd(query, key, lse, q_idx, k_idx, rows, index, scale, index_scale)
    return rows_ce.masked_fill(~counted, 0.0).sum()
