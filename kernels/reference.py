"""The meaning of every kernel, written directly with N x N tensors in the inputs' own precision.

Owns definitions for tests (run it in float64); owns no speed and no memory bound. Only tests import it.

Axes: b batch, s sequence (sq queries, sk keys), h query heads, g KV heads, d head dim, k selected.
"""

import torch
from torch import Tensor

from megatron_clsa.kernels.rows import RowRange


def selection_mask(index: Tensor | None, rows: RowRange, num_keys: int) -> Tensor:
    """`[b, sq, sk]` bool: keys that a query attends to, visible and (with an index) selected."""
    visible = rows.mask(num_keys)
    if index is None:
        return visible
    positions = torch.where(index < 0, num_keys, index).long()
    chosen = torch.zeros(*visible.shape[:2], num_keys + 1, dtype=torch.bool, device=visible.device)
    return chosen.scatter_(-1, positions, True)[..., :num_keys] & visible


def topk_index(q_idx: Tensor, k_idx: Tensor, rows: RowRange, k: int) -> Tensor:
    """Positions of the k best visible keys of each row: ties to the smaller position, ascending, -1 fills."""
    scores = torch.einsum("bqc,bkc->bqk", q_idx, k_idx)
    scores = scores + 0.0  # -0 becomes +0: one value, whatever the sort compares
    visible = rows.mask(k_idx.shape[1])
    scores = scores.masked_fill(~visible | scores.isnan(), float("-inf"))
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    by_visibility = torch.sort((~visible).gather(-1, order).to(torch.int8), dim=-1, stable=True).indices
    best = order.gather(-1, by_visibility)[..., :k]
    best = torch.where(visible.gather(-1, best), best, k_idx.shape[1]).sort(-1).values
    index = torch.full((*best.shape[:2], k), -1, dtype=torch.int32, device=best.device)
    index[..., : best.shape[-1]] = torch.where(best == k_idx.shape[1], -1, best)
    return index


def _probabilities(query: Tensor, key: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`[b, h, sq, sk]` softmax over the mask (zero in empty rows) and its LSE `[b, h, sq]`."""
    groups = query.shape[2] // key.shape[2]
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key.repeat_interleave(groups, 2)) * scale
    scores = scores.masked_fill(~mask[:, None], float("-inf"))
    lse = torch.logsumexp(scores, -1)
    shift = torch.where(lse == float("-inf"), torch.zeros_like(lse), lse)
    return torch.exp(scores - shift[..., None]), lse


def attention(query, key, value, rows: RowRange, scale: float, index: Tensor | None = None):
    """`(out [b, sq, h, d], lse [b, h, sq])` of softmax attention over visible (and selected) keys."""
    mask = selection_mask(index, rows, key.shape[1])
    probabilities, lse = _probabilities(query, key, mask, scale)
    value = value.repeat_interleave(query.shape[2] // key.shape[2], 2)
    return torch.einsum("bhqk,bkhd->bqhd", probabilities, value), lse


def attention_kd(query, key, q_idx, k_idx, rows: RowRange, index, scale: float, index_scale: float) -> Tensor:
    """`[b, sq]`: sum over heads of the cross-entropy of softmax(I) against each head's attention."""
    mask = selection_mask(index, rows, key.shape[1])
    with torch.no_grad():
        target = _probabilities(query, key, mask, scale)[0].sum(1)
    scores = torch.einsum("bqc,bkc->bqk", q_idx, k_idx) * index_scale
    log_q = torch.log_softmax(scores.masked_fill(~mask, float("-inf")), -1)
    return -(target * log_q.masked_fill(~mask, 0.0)).sum(-1)
