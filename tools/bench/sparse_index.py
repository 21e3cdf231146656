"""Indices to time sparse attention with: one whose neighbours share most keys, and one at random.

Owns how they are drawn; a trained indexer's overlap is measured by tools/profile_index.py.
"""

import torch
from torch import Tensor

_ROWS = 8192  # drawn at once


def _spread(step: Tensor, k: int, stay: int) -> Tensor:
    """`[steps, k]` in [0, 1): a number for each slot that stays for `stay` steps (an integer hash)."""
    slot = torch.arange(k, device=step.device)
    x = ((step + slot * 5 % stay) // stay * 2654435761 + slot * 40503 * 7919) & 0xFFFFFFFF
    for shift, factor in ((15, 2246822519), (13, 3266489917)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return ((x ^ (x >> 16)) & 0xFFFFFF).float() / 2**24


def overlapping_index(length: int, k: int, stay: int, device: torch.device) -> Tensor:
    """`[1, s, k]` int32: every query takes one key of each k-th of its past and keeps it for `stay` queries.

    Neighbours share `1 - 1/stay` of their keys, so T consecutive queries need about k (1 + (T - 1) / stay);
    `stay` 1 is an independent draw for each query. Keys drawn twice are dropped: rows may end in -1.
    """
    chunks = []
    for first in range(0, length, _ROWS):
        step = torch.arange(first, min(first + _ROWS, length), device=device)[:, None]
        slot = torch.arange(k, device=device)
        born = ((step + slot * 5 % stay) // stay * stay - slot * 5 % stay).clamp(min=0)
        position = ((slot + _spread(step, k, stay)) * (born + 1).float() / k).long().minimum(step)
        position = torch.where(step < k, torch.where(slot <= step, slot, length), position).sort(-1).values
        twice = torch.zeros_like(position, dtype=torch.bool)
        twice[:, 1:] = position[:, 1:] == position[:, :-1]
        position = position.masked_fill(twice, length).sort(-1).values
        chunks.append(torch.where(position == length, -1, position).int())
    return torch.cat(chunks)[None]
