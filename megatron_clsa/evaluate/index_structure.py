"""What an index looks like to a kernel: how much neighbours share, unions, runs, empty blocks, hot keys.

Owns the figures that tell which sparse attention kernel pays for a model; owns no attention and no model.
An index is `[s, k]` int32, row t's selected positions ascending, -1 after them. Rows that see no more than k
keys select all of them and say nothing: only longer rows are counted, and at most `SAMPLED` of them.
"""

import torch
from torch import Tensor

LAGS = (1, 2, 4, 8, 16, 32, 64)
TILES = (1, 2, 4, 8, 12, 16, 25, 32, 64)
BLOCKS = (64, 128)
SAMPLED = 512


def long_rows(index: Tensor) -> Tensor:
    """`[r]` rows that chose k of more than k keys."""
    full = (index >= 0).all(-1)
    return (full & (torch.arange(len(index), device=index.device) >= index.shape[1])).nonzero().flatten()


def _spread(rows: Tensor, count: int) -> Tensor:
    """At most `count` of the rows, evenly spread, the last included."""
    if len(rows) <= count:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, count).round().long().to(rows.device)]


def overlap_by_lag(index: Tensor) -> dict[int, float]:
    """Share of a row's selection that the row `lag` before selected too, for each lag that has rows."""
    rows, shares = long_rows(index), {}
    for lag in LAGS:
        pairs = _spread(rows[torch.isin(rows - lag, rows)], SAMPLED)
        if len(pairs):
            now, before = index[pairs].contiguous(), index[pairs - lag].contiguous()
            at = torch.searchsorted(before, now).clamp(max=index.shape[1] - 1)
            shares[lag] = (before.gather(1, at) == now).float().mean().item()
    return shares


def union_by_tile(index: Tensor) -> dict[int, float]:
    """Mean size of the union of T consecutive selections, in units of k, for each T that fits."""
    rows, sizes = long_rows(index), {}
    for tile in TILES:
        firsts = _spread(rows[torch.isin(rows + tile - 1, rows)], max(8, SAMPLED // tile))
        unions = [index[first : first + tile].unique().numel() for first in firsts.tolist()]
        if unions:
            sizes[tile] = sum(unions) / len(unions) / index.shape[1]
    return sizes


def run_lengths(index: Tensor) -> dict:
    """Runs of consecutive positions: mean length, and the share of positions in runs of at least 2^i."""
    chosen = index[_spread(long_rows(index), SAMPLED)]
    if not len(chosen):
        return {}
    starts = torch.ones_like(chosen, dtype=torch.bool)
    starts[:, 1:] = chosen.diff(dim=1) != 1
    lengths = torch.bincount(starts.flatten().cumsum(0) - 1).float()
    share = {2**i: (lengths[lengths >= 2**i].sum() / lengths.sum()).item() for i in range(8)}
    return {"mean": lengths.mean().item(), "share_in_runs_of_at_least": share}


def empty_blocks(index: Tensor) -> dict[int, float]:
    """Share of the causal B x B blocks, past the first k keys' rows, in which nothing is selected."""
    shares = {}
    for block in BLOCKS:
        total = empty = 0
        for first in range(index.shape[1] // block * block + block, len(index), block):
            rows = index[first : first + block]
            touched = torch.unique(rows[rows >= 0] // block).numel()
            visible = first // block + 1
            total, empty = total + visible, empty + visible - touched
        if total:
            shares[block] = empty / total
    return shares


def hot_keys(index: Tensor, count: int = 16) -> dict:
    """How unevenly keys are selected: the share of the hottest 1 %, and the hottest keys themselves."""
    chosen = index[long_rows(index)]
    if not len(chosen):
        return {}
    selections = torch.bincount(chosen.flatten().long(), minlength=len(index))
    ordered = selections.sort(descending=True)
    one_percent = max(1, len(index) // 100)
    return {
        "share_of_hottest_percent": (ordered.values[:one_percent].sum() / selections.sum()).item(),
        "never_selected": (selections == 0).float().mean().item(),
        "hottest": [
            {"position": p, "share_of_rows": n / len(chosen)}
            for p, n in zip(ordered.indices[:count].tolist(), ordered.values[:count].tolist(), strict=True)
        ],
    }


def structure(index: Tensor) -> dict:
    """All figures of one index `[s, k]`."""
    return {
        "length": len(index),
        "index_topk": index.shape[1],
        "long_rows": len(long_rows(index)),
        "overlap_by_lag": overlap_by_lag(index),
        "union_over_k": union_by_tile(index),
        "run_lengths": run_lengths(index),
        "empty_blocks": empty_blocks(index),
        "hot_keys": hot_keys(index),
    }
