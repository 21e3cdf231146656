"""How the plain-torch kernels walk the (query, key) plane: blocks that hold a visible pair, and their masks.

Owns the block sizes and the skipping of invisible blocks; owns no arithmetic on scores. The Triton
kernels have their own tiling.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_clsa.kernels.rows import RowRange


@dataclass(frozen=True)
class BlockSizes:
    """Rows and keys of one block: 256 x 512 keeps a block of 8 heads in a core's cache share (4 MiB fp32)."""

    query: int = 256
    key: int = 512


DEFAULT_BLOCKS = BlockSizes()


@dataclass(frozen=True)
class QueryBlock:
    """Rows `start..stop-1` and the keys `key_start..key_stop-1` that any of them may see."""

    start: int
    stop: int
    key_start: int
    key_stop: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    def key_blocks(self, size: int) -> Iterator[slice]:
        """The visible keys in steps aligned to `size`, so that a row meets the same blocks on every shard."""
        for start in range(self.key_start // size * size, self.key_stop, size):
            yield slice(max(start, self.key_start), min(start + size, self.key_stop))


def query_blocks(rows: RowRange, num_keys: int, size: int) -> list[QueryBlock]:
    """Blocks of `size` query rows with the range of keys that their non-empty rows can see."""
    empty = rows.end < rows.start
    first = rows.start.clamp(min=0).masked_fill(empty, num_keys)
    last = rows.end.masked_fill(empty, -1)
    bounds = [(a.amin(), b.amax()) for a, b in zip(first.split(size, 1), last.split(size, 1), strict=True)]
    starts = range(0, rows.end.shape[1], size)
    ranges = torch.stack([torch.stack(pair) for pair in bounds]).tolist() if bounds else []
    return [
        QueryBlock(s, min(s + size, rows.end.shape[1]), low, min(high + 1, num_keys))
        for s, (low, high) in zip(starts, ranges, strict=True)
    ]


def block_mask(block: QueryBlock, rows: RowRange, index: Tensor | None) -> Tensor:
    """`[b, block rows, block keys]` bool over `key_start..key_stop-1`: visible and (with an index) chosen."""
    width = max(block.key_stop - block.key_start, 0)
    part = RowRange(rows.start[:, block.rows], rows.end[:, block.rows])
    visible = part.mask(width, block.key_start)
    if index is None:
        return visible
    position = index[:, block.rows].long() - block.key_start
    position = torch.where((position < 0) | (position >= width), width, position)
    chosen = torch.zeros(*visible.shape[:2], width + 1, dtype=torch.bool, device=visible.device)
    return chosen.scatter_(-1, position, True)[..., :width] & visible


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 inputs are summed in float64, everything else in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
