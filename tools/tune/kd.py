"""Candidates of the distillation kernels: one layer, 20/4 heads of 128, value and both gradients.

Owns the configurations that were thought worth timing; what was fastest is `kd_launch.default_tiles`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from bench.kd import HEAD_DIM, HEADS, INDEX_DIM, KV_HEADS, forward_and_backward
from torch import Tensor

from megatron_clsa.kernels import indexer_kd
from megatron_clsa.kernels.kd_launch import Tiles
from megatron_clsa.kernels.rows import causal_rows


class DistillationCase:
    """See `tune.Case`."""

    candidates: ClassVar = {
        "64 x 128": Tiles(registers=168),
        "span 2048": Tiles(span=2048, registers=168),
        "band 16": Tiles(band=16, registers=168),
        "band 64": Tiles(band=64, registers=168),
        "dq spans of 8192": Tiles(gradient_span=8192, registers=168),
        "dq 2 stages": Tiles(gradient_stages=2, registers=168),
        "dq rows 128": Tiles(gradient_rows=128, registers=168),
        "dq 128, 2 stages": Tiles(gradient_rows=128, gradient_stages=2, registers=168),
    }

    def __init__(self, length: int, device: torch.device):
        self.length, self.device = length, device

    def draw(self) -> None:
        generator = torch.Generator(self.device).manual_seed(self.length)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32

        def tensor(*shape: int) -> Tensor:
            drawn = torch.randn(1, self.length, *shape, device=self.device, generator=generator)
            return drawn.to(dtype)

        query, key = tensor(HEADS, HEAD_DIM), tensor(KV_HEADS, HEAD_DIM)
        q_idx, k_idx = (tensor(INDEX_DIM).requires_grad_() for _ in range(2))
        rows = causal_rows(1, self.length, self.device)
        # About the log-sum-exp of t normal scores: probabilities of a row sum to about 1.
        lse = (torch.arange(self.length, device=self.device) + 1).log() + 0.5
        lse = lse.expand(1, HEADS, self.length).contiguous()
        self.arguments = query, key, lse, q_idx, k_idx, rows

    @contextmanager
    def configured(self, name: str) -> Iterator[None]:
        default = indexer_kd.default_tiles
        indexer_kd.default_tiles = lambda *tensors: self.candidates[name]
        try:
            yield
        finally:
            indexer_kd.default_tiles = default

    def call(self) -> None:
        counted = self.arguments[-1].end >= 0
        forward_and_backward(*self.arguments, None, counted)

    def result(self) -> tuple[Tensor, ...]:
        weight = torch.ones(1, self.length, device=self.device)
        scales = HEAD_DIM**-0.5, INDEX_DIM**-0.5
        tensors = [x.detach() for x in self.arguments[:5]]
        return indexer_kd.run_sweep(*tensors, self.arguments[5], None, weight, *scales, True)

    def difference(self, result: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str:
        """Of ce, dq and dk, as a share of the largest value."""
        shares = [((a - e).abs().max() / e.abs().max()).item() for a, e in zip(result, expected, strict=True)]
        return " ".join(f"{share:.1e}" for share in shares)
