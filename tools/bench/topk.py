"""Rows of the index: scores of every query and the exact top-k, against torch.topk on chunks of scores.

Owns the cases and the peers; the kernel is megatron_clsa.kernels.indexer_topk.
"""

from collections.abc import Iterator
from functools import partial

import torch
from bench.harness import Comparison, Settings, family, length_name
from torch import Tensor

from megatron_clsa.kernels import dispatch
from megatron_clsa.kernels.rows import causal_rows

INDEX_DIM, SELECTED, CHUNK = 128, 2048, 1024


def _score_chunks(q_idx: Tensor, k_idx: Tensor) -> Iterator[Tensor]:
    """`[1024, keys seen]` fp32 scores, masked; cropped to the keys that the chunk's last row sees."""
    for start in range(0, q_idx.shape[1], CHUNK):
        stop = min(start + CHUNK, q_idx.shape[1])
        scores = torch.matmul(q_idx[0, start:stop], k_idx[0, :stop].T).float()
        seen = torch.arange(start, stop, device=scores.device)[:, None]
        future = torch.arange(stop, device=scores.device)[None] > seen
        yield scores.masked_fill_(future, float("-inf"))


def torch_topk(q_idx: Tensor, k_idx: Tensor, k: int) -> None:
    for scores in _score_chunks(q_idx, k_idx):
        torch.topk(scores, min(k, scores.shape[1]), dim=-1, sorted=False)


def flashinfer_topk(q_idx: Tensor, k_idx: Tensor, k: int) -> None:
    import flashinfer

    for scores in _score_chunks(q_idx, k_idx):
        flashinfer.top_k(scores, min(k, scores.shape[1]))


@family("topk")
def topk_cases(settings: Settings) -> Iterator[Comparison]:
    for length in settings.lengths:
        generator = torch.Generator(settings.device).manual_seed(length)
        shape = dict(device=settings.device, generator=generator)
        q_idx, k_idx = (torch.randn(1, length, INDEX_DIM, **shape).to(settings.dtype) for _ in range(2))
        rows, k = causal_rows(1, length, settings.device), min(SELECTED, length // 4)
        yield Comparison(
            metric=f"indexer_topk_{length_name(length)}_ms",
            shape=f"all rows of s {length}, causal, k {k}, d_idx {INDEX_DIM}, {str(settings.dtype)[6:]}",
            ours=partial(dispatch.topk_index, q_idx, k_idx, rows, k),
            peers={
                "torch.topk on chunks of 1024 rows": partial(torch_topk, q_idx, k_idx, k),
                "flashinfer.top_k on chunks of 1024 rows": partial(flashinfer_topk, q_idx, k_idx, k),
            },
            flops=length * (length + 1) * INDEX_DIM,
            bytes=4.0 * length * k + 2.0 * (q_idx.nbytes + k_idx.nbytes),
        )
        del q_idx, k_idx, rows
