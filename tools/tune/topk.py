"""Candidates of the index: all rows of a causal sequence, k 2048, d_idx 128, bf16.

Owns the configurations that were thought worth timing: values of constants of the modules of the kernels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from bench.topk import INDEX_DIM, SELECTED
from torch import Tensor

from megatron_clsa.kernels import indexer_topk
from megatron_clsa.kernels.rows import causal_rows


class IndexCase:
    """See `tune.Case`."""

    candidates: ClassVar = {
        "default": {},
        "sample of 1 in 8": {"sample_stride": lambda keys: 8},
        "sample of 1 in 16": {"sample_stride": lambda keys: 16},
        "sample of 1 in 32": {"sample_stride": lambda keys: 32},
        "guess to 1 in 32": {"TOLERANCE": 1 / 32},
        "choose, blocks of 512": {"CHOOSE_BLOCK": 512},
        "choose, blocks of 2048": {"CHOOSE_BLOCK": 2048},
        "chunks of 65536 rows": {"ROWS_PER_CHUNK": 65536},
    }

    def __init__(self, length: int, device: torch.device):
        self.length, self.device = length, device

    def draw(self) -> None:
        generator = torch.Generator(self.device).manual_seed(self.length)
        shape = dict(device=self.device, generator=generator)
        vectors = (torch.randn(1, self.length, INDEX_DIM, **shape).bfloat16() for _ in range(2))
        self.q_idx, self.k_idx = vectors
        self.rows = causal_rows(1, self.length, self.device)

    @contextmanager
    def configured(self, name: str) -> Iterator[None]:
        saved = {key: getattr(indexer_topk, key) for key in self.candidates[name]}
        for key, value in self.candidates[name].items():
            setattr(indexer_topk, key, value)
        try:
            yield
        finally:
            for key, value in saved.items():
                setattr(indexer_topk, key, value)

    def call(self) -> Tensor:
        k = min(SELECTED, self.length // 4)
        return indexer_topk.triton_topk(
            self.q_idx, self.k_idx, self.rows, k, chunk_rows=indexer_topk.ROWS_PER_CHUNK
        )

    result = call

    def difference(self, result: Tensor, expected: Tensor) -> int:
        """Slots of the index that differ: 0 or the candidate is wrong."""
        return int((result != expected).sum())
