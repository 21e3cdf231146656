"""What all kernel tests share: problems with packed documents and shards, and the rule for errors.

Owns no assertions about a particular kernel.
"""

from dataclasses import dataclass

import torch

from megatron_clsa.kernels.rows import RowRange, causal_rows


@dataclass
class Case:
    """One attention problem: query `[b, sq, h, d]`, key and value `[b, sk, g, d]`, indexer, visible rows."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    q_idx: torch.Tensor
    k_idx: torch.Tensor
    rows: RowRange
    scale: float
    index_scale: float

    def to(self, dtype) -> "Case":
        names = ("query", "key", "value", "q_idx", "k_idx")
        moved = {n: getattr(self, n).detach().to(dtype).requires_grad_() for n in names}
        return Case(**moved, rows=self.rows, scale=self.scale, index_scale=self.index_scale)


def packed_rows(batch: int, seq: int, lengths: list[int], device="cpu") -> RowRange:
    """Documents of the given lengths, repeated until the sequence is full."""
    starts, position = [], 0
    while position < seq:
        for length in lengths:
            starts += [position] * min(length, seq - position)
            position += min(length, seq - position)
    start = torch.tensor(starts, dtype=torch.int32, device=device).expand(batch, seq)
    return RowRange(start, causal_rows(batch, seq, device).end)


def zigzag_positions(seq: int, rank: int, size: int) -> torch.Tensor:
    """Positions that context-parallel rank `rank` of `size` holds: pieces `rank` and `2 size - 1 - rank`."""
    pieces = torch.arange(seq).chunk(2 * size)
    return torch.cat([pieces[rank], pieces[2 * size - 1 - rank]])


def take_rows(rows: RowRange, positions: torch.Tensor) -> RowRange:
    return RowRange(rows.start[:, positions], rows.end[:, positions])


def make_case(b=1, sq=65, h=4, g=2, d=32, d_idx=16, rows=None, sk=None, seed=0, device="cpu") -> Case:
    generator = torch.Generator().manual_seed(seed)
    sk = sk or sq

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    rows = rows or causal_rows(b, sq, device)
    parts = draw(b, sq, h, d), draw(b, sk, g, d), draw(b, sk, g, d), draw(b, sq, d_idx), draw(b, sk, d_idx)
    return Case(*parts, rows=rows, scale=d**-0.5, index_scale=d_idx**-0.5)


def random_index(rows: RowRange, num_keys: int, k: int, seed=0) -> torch.Tensor:
    """A valid index: k visible positions a row at random, ascending, -1 at the tail."""
    generator = torch.Generator().manual_seed(seed)
    visible = rows.mask(num_keys).cpu()
    noise = torch.rand(visible.shape, generator=generator).masked_fill(~visible, -1.0)
    best = noise.topk(min(k, num_keys), -1)
    position = torch.where(best.values < 0, num_keys, best.indices).sort(-1).values
    index = torch.full((*visible.shape[:2], k), -1, dtype=torch.int32)
    index[..., : position.shape[-1]] = torch.where(position == num_keys, -1, position)
    return index.to(rows.end.device)


def assert_as_exact_as_torch(actual, same_precision, exact, floor_ulps=64.0):
    """FlashAttention's rule: at most twice the error of plain torch in the same precision, plus rounding.

    The floor is for differences of two sums over d products (dP - delta) that the reference cancels exactly.
    """
    eps = torch.finfo(torch.float64 if actual.dtype == torch.float64 else torch.float32).eps
    actual, same_precision, exact = (x.detach().double().cpu() for x in (actual, same_precision, exact))
    assert torch.isfinite(actual).all()
    floor = floor_ulps * eps * max(exact.abs().max().item(), 1.0)
    error, allowed = (actual - exact).abs().max().item(), (same_precision - exact).abs().max().item()
    assert error <= 2 * allowed + floor, f"error {error:.3g}, plain torch {allowed:.3g}, floor {floor:.3g}"
