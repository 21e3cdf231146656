"""Launches of the masked-dense kernels, and their tile sizes in one table.

Owns which tiling serves a head dim and dtype; tools/tune_attention.py times others beside it.
Axes: b batch, sq queries, sk keys, h query heads, g KV heads, d head dim, R rows of a plan's tile.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from megatron_clsa.kernels.mask_plan import KEY_BLOCK, KEY_TILE, LiveBlocks, MaskPlan
from megatron_clsa.kernels.masked_backward import (
    masked_key_gradients,
    masked_query_gradients,
    row_statistics,
)
from megatron_clsa.kernels.masked_forward import masked_forward


@dataclass(frozen=True)
class Tiling:
    """One kernel's tile: at most `rows` rows and `keys` keys, how many warps, and loads in flight."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tilings:
    """One tiling a kernel."""

    forward: Tiling
    query_gradients: Tiling
    key_gradients: Tiling


_HALF = {
    64: Tilings(Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 2), Tiling(64, 128, 8, 2)),
    128: Tilings(Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 2), Tiling(64, 128, 8, 2)),
    256: Tilings(Tiling(64, 64, 8, 2), Tiling(64, 64, 8, 1), Tiling(64, 64, 8, 1)),
}
# fp32 products run on the plain arithmetic units, unrolled: small tiles keep them in registers.
_FULL = Tilings(Tiling(16, 32, 4, 1), Tiling(16, 32, 4, 1), Tiling(16, 32, 4, 1))


def tilings(dtype: torch.dtype, dim: int) -> Tilings:
    """The table's entry for inputs of a dtype and head dim."""
    return _FULL if dtype == torch.float32 else _HALF[max(64, dim)]


def forward(query, key, value, plan: MaskPlan, scale: float, tiling: Tiling) -> tuple[Tensor, Tensor]:
    """`(out [b, sq, h, d], lse [b, h, sq] fp32)`."""
    b, sq, h, _ = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(b, h, sq, dtype=torch.float32, device=query.device)
    constants = _constants(query, key, plan.queries, KEY_BLOCK, tiling)
    grid = plan.words.shape[0] * (constants["R"] // constants["ROWS"]), key.shape[2]
    masked_forward[grid](
        query, key, value, plan.words, *_lists(plan.key_blocks), out, lse, scale, *_sizes(query, key, plan),
        *_strides(query, key, value), **constants,
    )  # fmt: skip
    return out, lse


def statistics(query, key, out, dout, lse, dlse, plan: MaskPlan) -> tuple[Tensor, Tensor]:
    """`row_statistics` of a backward: two `[b, g, t, R]` fp32 tensors."""
    b, sq, h, d = query.shape
    group, tiles = h // key.shape[2], triton.cdiv(sq, plan.queries)
    rows = _tile_rows(plan.queries, group)
    parts = [torch.empty(b, key.shape[2], tiles, rows, device=query.device) for _ in range(2)]
    row_statistics[(b * tiles, key.shape[2])](
        out, dout, lse, dlse, *parts, tiles, sq, *_strides(out, dout), G=group, T=plan.queries, R=rows, D=d
    )
    return parts[0], parts[1]


def query_gradients(query, key, value, dout, lse2, delta, plan: MaskPlan, scale: float, tiling: Tiling):
    """dQ `[b, sq, h, d]`."""
    dquery = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    constants = _constants(query, key, plan.queries, KEY_BLOCK, tiling)
    grid = plan.words.shape[0] * (constants["R"] // constants["ROWS"]), key.shape[2]
    masked_query_gradients[grid](
        query, key, value, dout, plan.words, *_lists(plan.key_blocks), lse2, delta, dquery, scale,
        *_sizes(query, key, plan), *_strides(query, key, value, dout), **constants,
    )  # fmt: skip
    return dquery


def key_gradients(query, key, value, dout, lse2, delta, plan: MaskPlan, scale: float, tiling: Tiling):
    """dK and dV `[b, sk, g, d]`."""
    dkey, dvalue = (torch.empty(key.shape, dtype=key.dtype, device=key.device) for _ in range(2))
    constants = _constants(query, key, plan.queries, KEY_TILE, tiling)
    tiles = key.shape[0] * plan.words.shape[1] // KEY_TILE
    masked_key_gradients[(tiles * (KEY_TILE // constants["KEYS"]), key.shape[2])](
        query, key, value, dout, plan.words, *_lists(plan.query_tiles), lse2, delta, dkey, dvalue, scale,
        *_sizes(query, key, plan), *_strides(query, key, value, dout), **constants,
    )  # fmt: skip
    return dkey, dvalue


def _tile_rows(queries: int, group: int) -> int:
    return max(16, triton.next_power_of_2(queries * group))


def _constants(query: Tensor, key: Tensor, queries: int, block: int, tiling: Tiling) -> dict:
    group = query.shape[2] // key.shape[2]
    rows = _tile_rows(queries, group)
    return {
        "G": group,
        "T": queries,
        "R": rows,
        "D": query.shape[3],
        "BLOCK": block,
        "ROWS": min(rows, tiling.rows),
        "KEYS": min(block, tiling.keys),
        "STAGES": tiling.stages,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        "num_warps": tiling.warps,
    }


def _lists(live: LiveBlocks) -> tuple[Tensor, Tensor, Tensor]:
    return live.offsets, live.entries, live.order


def _sizes(query: Tensor, key: Tensor, plan: MaskPlan) -> tuple[int, int, int, int]:
    """Tiles of a sequence, sq, sk, w."""
    sq = query.shape[1]
    return triton.cdiv(sq, plan.queries), sq, key.shape[1], plan.words.shape[1]


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]
