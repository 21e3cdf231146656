"""Which keys a query row may see: one closed range of positions a row.

Owns that range and nothing else: causality, packed documents, context-parallel shards, windows and left
padding are all expressed by it, so that no kernel knows about any of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowRange:
    """Visible keys of each query row: positions `start..end`, both included, keys in global order.

    Attributes:
        start: `[b, sq]` int32, first visible position (the document's first token, or the window's).
        end: `[b, sq]` int32, last visible position: the query's own. `end < start` marks an empty row.
    """

    start: Tensor
    end: Tensor

    def windowed(self, window: int) -> "RowRange":
        """The same rows limited to the last `window` positions, the query's own included."""
        return RowRange(torch.maximum(self.start, self.end - (window - 1)), self.end)

    def mask(self, num_keys: int, first_key: int = 0) -> Tensor:
        """`[b, sq, num_keys]` bool, true where the key `first_key + j` is visible."""
        j = torch.arange(first_key, first_key + num_keys, device=self.end.device, dtype=self.end.dtype)
        return (j >= self.start[..., None]) & (j <= self.end[..., None])


def causal_rows(batch: int, seq: int, device: torch.device | str = "cpu") -> RowRange:
    """Plain causal rows of one unpacked sequence: query `t` sees `0..t`."""
    end = torch.arange(seq, device=device, dtype=torch.int32).expand(batch, seq)
    return RowRange(torch.zeros_like(end), end)
