"""Launches of the distillation kernels: tiles, scratch, and the walk over batch entries and chunks of rows.

Owns memory and launches; the arithmetic is in `kd_sweep.py`, autograd in `indexer_kd.py`.
The scores' gradient d is kept for one chunk of rows at a time, in a scratch of at most SCRATCH_BYTES: the
chunk's dq_idx and dk_idx are made from it before the next chunk. Chunks follow one another in order, so that
dk_idx has one order of summation. Axes: b batch, sq queries, sk keys, h heads, d head dim, di index dim.
"""

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_clsa.kernels import kd_sweep
from megatron_clsa.kernels.rows import RowRange

SCRATCH_BYTES = 512 * 2**20
LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Tiles:
    """Tile sizes and the launch of the sweep; the defaults are the fastest measured on an H100."""

    rows: int = 64
    keys: int = 128
    span: int = 1024
    band: int = 32
    warps: int = 4
    stages: int = 2
    registers: int | None = None
    dq_in_sweep: bool = False
    heads_by_fma: int = 0


@dataclass(frozen=True)
class Inputs:
    """Contiguous inputs of one call; lse in log2 units with +inf in empty rows, so that exp2 gives 0."""

    query: Tensor
    key: Tensor
    lse: Tensor
    q_idx: Tensor
    k_idx: Tensor
    rows: RowRange
    index: Tensor | None
    scale: float
    index_scale: float

    @property
    def precision(self) -> str:
        return "ieee" if self.query.dtype == torch.float32 else "tf32"


def default_tiles(query: Tensor, q_idx: Tensor) -> Tiles:
    widest = max(query.shape[-1], q_idx.shape[-1])
    if query.dtype == torch.float32:
        return Tiles(rows=32, keys=32, stages=1)
    return Tiles(keys=64) if widest > 128 else Tiles()


def _flat(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """`[b, s, ...]` as a matrix of b s rows, read in blocks of `rows` x `columns`; zero beyond its end."""
    flat = x.reshape(x.shape[0] * x.shape[1], -1)
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [rows, columns])


def _tile_ranges(rows: RowRange, row_tile: int, num_keys: int) -> tuple[Tensor, Tensor]:
    """`[b, tiles]` int32 twice: keys `low..high-1` that any row of the tile sees; low = high if none."""
    start, end = rows.start.clamp(min=0), rows.end.clamp(max=num_keys - 1)
    empty = end < start
    pad = -start.shape[1] % row_tile
    low = torch.nn.functional.pad(start.masked_fill(empty, num_keys), (0, pad), value=num_keys)
    high = torch.nn.functional.pad((end + 1).masked_fill(empty, 0), (0, pad), value=0)
    low, high = (x.unflatten(1, (-1, row_tile)) for x in (low, high))
    low, high = low.amin(2), high.amax(2)
    return torch.minimum(low, high).int().contiguous(), high.int().contiguous()


def _selected_bytes(index: Tensor, padded: int, rows: int) -> Tensor:
    """`[rows, padded]` bytes, 1 at the positions of `index [r, k]`; -1 marks nothing."""
    at = torch.where(index < 0, padded, index).long()
    chosen = torch.zeros(rows, padded + 1, dtype=torch.uint8, device=index.device)
    chosen[: at.shape[0]].scatter_(1, at, 1)
    return chosen[:, :padded].contiguous()


class Sweep:
    """One call: its descriptors, its scratch, and the walk over batch and chunks of rows."""

    def __init__(self, inputs: Inputs, weight: Tensor | None, want_dq: bool, tiles: Tiles):
        self.inputs, self.tiles, self.gradient = inputs, tiles, want_dq or weight is not None
        self.want_dq, self.weight = want_dq, weight
        b, sq, h, d = inputs.query.shape
        self.sk, self.kv = inputs.key.shape[1:3]
        self.b, self.sq, self.h, self.d, self.di = b, sq, h, d, inputs.q_idx.shape[-1]
        self.wide = max(16, triton.next_power_of_2(self.di))
        self.padded = triton.cdiv(self.sk, tiles.keys) * tiles.keys
        self.spans = triton.cdiv(self.sk, tiles.span)
        row_bytes = self.padded * (inputs.query.element_size() + (inputs.index is not None))
        fitting = max(1, SCRATCH_BYTES // row_bytes // tiles.rows) * tiles.rows
        self.chunk = min(fitting, triton.cdiv(sq, tiles.rows) * tiles.rows)
        self.q = _flat(inputs.query, tiles.rows, d)
        self.k = _flat(inputs.key, tiles.keys, d)
        self.qi, self.ki = (
            _flat(inputs.q_idx, tiles.rows, self.wide),
            _flat(inputs.k_idx, tiles.keys, self.wide),
        )
        self.low, self.high = _tile_ranges(inputs.rows, tiles.rows, self.sk)

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """ce `[b, sq]`, dq `[b, sq, di]` unweighted, dk `[b, sk, di]` weighted, all fp32."""
        new = dict(dtype=torch.float32, device=self.inputs.query.device)
        ce = torch.empty(self.b, self.sq, **new)
        dq = torch.empty(self.b, self.sq if self.want_dq else 0, self.di, **new)
        dk = torch.zeros(self.b, self.sk if self.weight is not None else 0, self.di, **new)
        scratch = torch.empty(
            self.chunk if self.gradient else 0, self.padded, dtype=self.inputs.query.dtype, device=dk.device
        )
        weighted = None
        if self.weight is not None:
            weighted = _flat(
                (self.inputs.q_idx * self.weight[..., None]).to(self.inputs.q_idx.dtype),
                self.tiles.rows,
                self.wide,
            )
        for batch in range(self.b):
            for row0 in range(0, self.sq, self.chunk):
                self._chunk(batch, row0, scratch, weighted, ce, dq, dk)
        return ce, dq.mul_(self.inputs.index_scale), dk.mul_(self.inputs.index_scale)

    def _chunk(self, batch: int, row0: int, scratch, weighted, ce, dq, dk) -> None:
        inputs, tiles = self.inputs, self.tiles
        count = min(self.chunk, self.sq - row0)
        row_tiles, first = triton.cdiv(count, tiles.rows), row0 // tiles.rows
        low, high = self.low[batch, first:], self.high[batch, first:]
        rows = inputs.rows.start, inputs.rows.end, low, high
        chosen = None
        if inputs.index is not None:
            chosen = _selected_bytes(
                inputs.index[batch, row0 : row0 + count], self.padded, row_tiles * tiles.rows
            )
        new = dict(dtype=torch.float32, device=ce.device)
        tile = {"BM": tiles.rows, "BN": tiles.keys, "PRECISION": inputs.precision}
        common = {"SPAN": tiles.span, "SELECTED": chosen is not None, **tile}
        parts = torch.empty(self.spans, count, **new)
        kd_sweep.index_lse[(row_tiles, self.spans)](
            self.qi, self.ki, *rows, chosen, parts, batch, row0, count, self.sq, self.sk, self.padded,
            inputs.index_scale * LOG2E, D=self.wide, num_warps=tiles.warps, **common,
        )  # fmt: skip
        index_lse = torch.logsumexp(parts / LOG2E, 0) * LOG2E
        empty = index_lse == float("-inf")
        index_lse = index_lse.masked_fill(empty, 0.0)
        product, partial = (
            torch.empty(self.spans, count, **new),
            torch.empty(self.spans if self.want_dq else 0, count, self.di, **new),
        )
        options = {} if tiles.registers is None else {"maxnreg": tiles.registers}
        kd_sweep.sweep[(row_tiles * self.spans,)](
            self.q, self.k, inputs.lse, self.qi, self.ki, index_lse, *rows, chosen, scratch, product, partial,
            batch, row0, count, self.sq, self.sk, self.padded, row_tiles, self.spans,
            inputs.scale * LOG2E, inputs.index_scale * LOG2E,
            KV=self.kv, G=self.h // self.kv, HEAD=self.d, DI=self.di, D=self.wide, BAND=tiles.band,
            DQ_HERE=self.want_dq and tiles.dq_in_sweep, GRADIENT=self.gradient, BY_FMA=tiles.heads_by_fma,
            STAGES=tiles.stages, num_warps=tiles.warps, **common, **options,
        )  # fmt: skip
        value = (self.h * index_lse - product.sum(0)) / LOG2E
        ce[batch, row0 : row0 + count] = value.masked_fill(empty, 0.0)
        shared = {
            "DI": self.di,
            "D": self.wide,
            "num_warps": 4,
            "STAGES": 3 if tile["PRECISION"] == "tf32" else 1,
        }
        if self.want_dq:
            if not tiles.dq_in_sweep:
                kd_sweep.query_gradient[(row_tiles, self.spans)](
                    scratch, self.ki, low, high, partial, batch, count, self.sk, self.padded,
                    SPAN=tiles.span, **tile, **shared,
                )  # fmt: skip
            torch.sum(partial, 0, out=dq[batch, row0 : row0 + count])
        if weighted is not None:
            kd_sweep.key_gradient[(self.padded // tiles.keys,)](
                scratch, weighted, low, high, dk[batch],
                batch, row0, self.sq, self.sk, self.padded, row_tiles,
                TILES=triton.next_power_of_2(row_tiles), **tile, **(shared | {"num_warps": 8}),
            )  # fmt: skip
