"""Rows of the distillation loss: value and both gradients of one layer, against the dense forward pass.

Owns the cases; the kernels are megatron_clsa.kernels.indexer_kd. No peer computes this loss without an N x N
tensor, so it is held against the cuDNN attention whose probabilities it makes once more.
"""

from collections.abc import Iterator
from functools import partial

import torch
from bench.harness import Comparison, Settings, family, length_name
from bench.sparse_index import overlapping_index
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_clsa.kernels import dispatch
from megatron_clsa.kernels.rows import RowRange, causal_rows

HEADS, KV_HEADS, HEAD_DIM, INDEX_DIM, SELECTED = 20, 4, 128, 128, 2048


def cudnn_forward(query: Tensor, key: Tensor) -> Tensor:
    q, k = query.transpose(1, 2), key.transpose(1, 2)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)


def forward_and_backward(query, key, lse, q_idx, k_idx, rows: RowRange, index, counted, plan=None) -> None:
    scales = HEAD_DIM**-0.5, INDEX_DIM**-0.5
    total = dispatch.attention_kd_sum(query, key, lse, q_idx, k_idx, rows, index, counted, *scales, plan)
    torch.autograd.grad(total, (q_idx, k_idx))


def spread_index(rows: RowRange, k: int) -> Tensor:
    """`[1, s, k]` int32: k positions spread evenly over what each row sees; all of them in short rows."""
    seen = (rows.end + 1)[..., None].long()
    slot = torch.arange(k, device=rows.end.device)
    return torch.where(seen <= k, torch.where(slot < seen, slot, -1), slot * seen // k).int()


def local_index(rows: RowRange, k: int) -> Tensor:
    """`[1, s, k]` int32: the k keys before each row, itself included: most tiles of keys hold none."""
    position = (rows.end + 1 - k).clamp(min=0)[..., None] + torch.arange(k, device=rows.end.device)
    return torch.where(position <= rows.end[..., None], position, -1).int()


def neighbours_index(rows: RowRange, k: int) -> Tensor:
    """`[1, s, k]` int32: neighbours share 7/8 of their keys, as where the attention is timed."""
    return overlapping_index(rows.end.shape[1], k, 8, rows.end.device)


MODES = {
    "full": None,
    "selected": spread_index,
    "selected_neighbours": neighbours_index,
    "selected_local": local_index,
}


@family("kd")
def kd_cases(settings: Settings) -> Iterator[Comparison]:
    for length in settings.lengths:
        generator = torch.Generator(settings.device).manual_seed(length)
        shape = dict(device=settings.device, generator=generator, dtype=settings.dtype)
        query = torch.randn(1, length, HEADS, HEAD_DIM, **shape)
        key = torch.randn(1, length, KV_HEADS, HEAD_DIM, **shape)
        q_idx, k_idx = (torch.randn(1, length, INDEX_DIM, **shape).requires_grad_() for _ in range(2))
        rows = causal_rows(1, length, settings.device)
        # Any number serves as LSE for the clock: the kernels do the same work.
        lse = torch.full((1, HEADS, length), 9.0, device=settings.device)
        counted, pairs = rows.end >= 0, length * (length + 1) / 2
        for mode, make in MODES.items():
            index = make(rows, SELECTED) if make else None
            plan = None
            if make:
                plan = dispatch.build_plan(index, rows, length, HEADS // KV_HEADS, distilled=True)
            seen = pairs if index is None else float(index.ge(0).sum())
            yield Comparison(
                metric=f"kd_{mode}_{length_name(length)}_ms",
                shape=f"s {length}, causal, {HEADS}/{KV_HEADS} heads, d {HEAD_DIM}, d_idx {INDEX_DIM}, "
                f"{str(settings.dtype)[6:]}, one layer, value and gradients",
                ours=partial(forward_and_backward, query, key, lse, q_idx, k_idx, rows, index, counted, plan),
                peers={"cuDNN dense forward": partial(cudnn_forward, query, key)},
                flops=seen * (2 * HEADS * HEAD_DIM + 6 * INDEX_DIM),
                bytes=2.0 * (query.nbytes + key.nbytes),
            )
            del index, plan
        del query, key, q_idx, k_idx, rows, lse, counted
