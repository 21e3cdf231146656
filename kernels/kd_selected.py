"""What the distillation over selected keys needs of an index: a byte mask, and the tiles that hold any of it.

Owns both for one chunk of rows. Axes: r rows of the chunk, k selected, t row tiles, n key tiles.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@dataclass(frozen=True)
class Selected:
    """The selected keys of a chunk of rows.

    Attributes:
        mask: `[padded rows, padded keys]` uint8, 1 where the row selects the key.
        flags: `[t, n]` int32, 1 where any row of the tile selects any key of the tile.
    """

    mask: Tensor
    flags: Tensor


@triton.jit
def _mark(INDEX, MASK, FLAGS, k, padded, width, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """One row: its selected keys. Programs that set the same flag store the same value."""
    row = tl.program_id(0)
    for first in range(0, k, BLOCK):
        c = first + tl.arange(0, BLOCK)
        position = tl.load(INDEX + row.to(tl.int64) * k + c, mask=c < k, other=-1)
        one = tl.full([BLOCK], 1, tl.int32)
        tl.store(MASK + row.to(tl.int64) * padded + position, one.to(tl.uint8), mask=position >= 0)
        tl.store(FLAGS + row // ROWS * width + position // KEYS, one, mask=position >= 0)


def mark_selected(index: Tensor, padded_rows: int, padded_keys: int, rows: int, keys: int) -> Selected:
    """`index [r, k]` int32, -1 ignored; tiles of `rows` x `keys`, which divide the padded sizes."""
    new = dict(device=index.device)
    mask = torch.zeros(padded_rows, padded_keys, dtype=torch.uint8, **new)
    flags = torch.zeros(padded_rows // rows, padded_keys // keys, dtype=torch.int32, **new)
    (count, k), width = index.shape, flags.shape[1]
    if count and k:
        _mark[(count,)](
            index.contiguous(), mask, flags, k, padded_keys, width, ROWS=rows, KEYS=keys, BLOCK=BLOCK
        )
    return Selected(mask, flags)
