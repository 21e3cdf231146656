"""Launches of the masked-dense kernels, and their tile sizes in one table.

Owns which tiling serves a head dim and dtype; tools/tune_attention.py times others beside it.
Axes: b batch, sq queries, sk keys, h query heads, g KV heads, d head dim, R rows of a plan's tile.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from megatron_clsa.kernels.mask_plan import KEY_BLOCK, LiveBlocks, MaskPlan
from megatron_clsa.kernels.masked_backward import (
    masked_key_gradients,
    masked_query_gradients,
    pack_rows,
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


# Fastest of those that tools/tune_attention.py timed for 128 dims at 32K on an H200; 64 takes the same.
_COMMON = Tilings(Tiling(128, 128, 8, 2), Tiling(128, 128, 8, 2), Tiling(64, 64, 4, 2))
_HALF = {
    64: _COMMON,
    128: _COMMON,
    256: Tilings(Tiling(64, 64, 8, 2), Tiling(64, 32, 8, 2), Tiling(32, 64, 8, 2)),  # others spill
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
    constants = _constants(query.shape, key, plan.queries, tiling)
    grid = plan.words.shape[0] * (constants["R"] // constants["ROWS"]), key.shape[2]
    masked_forward[grid](
        query, key, value, plan.words, *_lists(plan.key_blocks), out, lse, scale,
        triton.cdiv(sq, plan.queries), sq, key.shape[1], plan.words.shape[1], *_strides(query, key, value),
        **_whole(key), **constants,
    )  # fmt: skip
    return out, lse


@dataclass(frozen=True, eq=False)
class Packed:
    """Rows in the order of the plan's tiles.

    Attributes:
        query, dout: `[b, g, t, R, d]`.
        lse2, delta: `[b, g, t, R]` fp32, see `pack_rows`.
        bit: `[R]` int32, each row's bit in a tile's words, 0 for padding.
    """

    query: Tensor
    dout: Tensor
    lse2: Tensor
    delta: Tensor
    bit: Tensor


def pack(query, key, out, dout, lse, dlse, plan: MaskPlan) -> Packed:
    """What both gradient kernels read. `lse` and `dlse` are contiguous."""
    (b, sq, h, d), g = query.shape, key.shape[2]
    tiles, rows = triton.cdiv(sq, plan.queries), _tile_rows(plan.queries, h // g)
    shape = b, g, tiles, rows
    new = {"device": query.device}
    vectors = [torch.empty(*shape, d, dtype=query.dtype, **new) for _ in range(2)]
    numbers = [torch.empty(shape, dtype=torch.float32, **new) for _ in range(2)]
    packed = Packed(*vectors, *numbers, torch.empty(rows, dtype=torch.int32, **new))
    pack_rows[(b * tiles, g)](
        query, out, dout, lse, dlse, *vectors, *numbers, packed.bit, tiles, sq, *_strides(query, out, dout),
        G=h // g, T=plan.queries, R=rows, D=d, num_warps=8,
    )  # fmt: skip
    return packed


def query_gradients(
    packed: Packed, key, value, plan: MaskPlan, shape, scale: float, tiling: Tiling
) -> Tensor:
    """dQ of `shape [b, sq, h, d]`."""
    sq = shape[1]
    dquery = torch.empty(shape, dtype=key.dtype, device=key.device)
    constants = _constants(shape, key, plan.queries, tiling)
    grid = plan.words.shape[0] * (constants["R"] // constants["ROWS"]), key.shape[2]
    masked_query_gradients[grid](
        packed.query, packed.dout, packed.lse2, packed.delta, key, value, plan.words,
        *_lists(plan.key_blocks), dquery, scale, triton.cdiv(sq, plan.queries), sq, key.shape[1],
        plan.words.shape[1], *_strides(key, value), **_whole(key), **constants,
    )  # fmt: skip
    return dquery


def key_gradients(packed: Packed, key, value, plan: MaskPlan, shape, scale: float, tiling: Tiling):
    """dK and dV `[b, sk, g, d]`."""
    b, sk, g, _ = key.shape
    dkey, dvalue = (torch.empty(key.shape, dtype=key.dtype, device=key.device) for _ in range(2))
    constants = _constants(shape, key, plan.queries, tiling)
    del constants["G"], constants["T"]  # packed rows need neither
    width = plan.words.shape[1]
    masked_key_gradients[(b * width // constants["KEYS"], g)](
        packed.query, packed.dout, packed.lse2, packed.delta, packed.bit, key, value, plan.words,
        *_lists(plan.query_tiles), dkey, dvalue, scale, triton.cdiv(shape[1], plan.queries), sk, width,
        *_strides(key, value), **constants,
    )  # fmt: skip
    return dkey, dvalue


def _tile_rows(queries: int, group: int) -> int:
    return max(16, triton.next_power_of_2(queries * group))


def _constants(shape, key: Tensor, queries: int, tiling: Tiling) -> dict:
    group = shape[2] // key.shape[2]
    rows = _tile_rows(queries, group)
    return {
        "G": group,
        "T": queries,
        "R": rows,
        "D": shape[3],
        "BLOCK": KEY_BLOCK,
        "ROWS": min(rows, tiling.rows),
        "KEYS": tiling.keys,
        "STAGES": tiling.stages,
        "PRECISION": "ieee" if key.dtype == torch.float32 else "tf32",
        "num_warps": tiling.warps,
    }


def _lists(live: LiveBlocks) -> tuple[Tensor, Tensor, Tensor]:
    return live.offsets, live.entries, live.order


def _whole(key: Tensor) -> dict:
    return {"WHOLE": key.shape[1] % KEY_BLOCK == 0}


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]
