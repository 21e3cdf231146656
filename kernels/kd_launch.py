"""Launches of the distillation kernels: tiles, scratch, and the walk over batch entries and chunks of rows.

Owns memory and launches; the arithmetic is in `kd_sweep.py`, autograd in `indexer_kd.py`.
The scores' gradient d is kept for one chunk of rows at a time, in a scratch of at most SCRATCH_BYTES: the
chunk's dq_idx and dk_idx are made from it before the next chunk. Chunks follow one another in order, so that
dk_idx has one order of summation. Axes: b batch, sq queries, sk keys, h heads, d head dim, di index dim.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_clsa.kernels import kd_sweep
from megatron_clsa.kernels.kd_selected import Selected, mark_selected
from megatron_clsa.kernels.rows import RowRange

SCRATCH_BYTES = 512 * 2**20
LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Tiles:
    """Tile sizes and the launch of the sweep; `default_tiles` holds what was fastest on an H100.

    The index's LSE and dq take `gradient_rows` at a time, a multiple of `rows`.
    """

    rows: int = 64
    keys: int = 128
    span: int = 1024
    gradient_rows: int = 64
    gradient_span: int = 4096
    gradient_stages: int = 3
    band: int = 32
    warps: int = 4
    stages: int = 2
    registers: int | None = None


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


def default_tiles(query: Tensor, q_idx: Tensor) -> Tiles:
    """Three programs a multiprocessor (168 registers) beat two without spills."""
    if query.dtype == torch.float32:
        return Tiles(rows=32, keys=32, gradient_rows=32, stages=1)
    if max(query.shape[-1], q_idx.shape[-1]) > 128:
        return Tiles(keys=64)
    return Tiles(registers=168)


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


def cross_entropy(index_lse: Tensor, product: Tensor, heads: int) -> Tensor:
    """ce of rows from the log2-sum of exp(I) and the sum of A I, in log2 units; 0 in rows without keys.

    Those have a sum of nothing; a row of NaN scores, whose LSE is -inf too, stays NaN.
    """
    empty = (index_lse == float("-inf")) & (product == 0)
    return ((heads * index_lse - product) / LOG2E).masked_fill(empty, 0.0)


@dataclass(frozen=True)
class _Chunk:
    """Rows `row0 .. row0 + count - 1` of one batch entry: the arguments that every launch takes.

    Attributes:
        low, high: `[tiles ..]` int32, the keys that each row tile sees.
        chosen: the selected keys, or None without an index.
    """

    batch: int
    row0: int
    count: int
    row_tiles: int
    low: Tensor
    high: Tensor
    chosen: Selected | None

    @property
    def mask(self) -> Tensor | None:
        return self.chosen.mask if self.chosen else None

    @property
    def flags(self) -> Tensor | None:
        return self.chosen.flags if self.chosen else None


class Sweep:
    """One call: its descriptors, its scratch, and the walk over batch entries and chunks of rows."""

    def __init__(self, inputs: Inputs, weight: Tensor | None, want_dq: bool, tiles: Tiles):
        self.inputs, self.tiles, self.weight, self.want_dq = inputs, tiles, weight, want_dq
        self.gradient = want_dq or weight is not None
        self.b, self.sq, self.h, self.d = inputs.query.shape
        self.sk, self.kv = inputs.key.shape[1:3]
        self.di = inputs.q_idx.shape[-1]
        self.wide = max(16, triton.next_power_of_2(self.di))
        self.padded = (self.sk // tiles.keys + 1) * tiles.keys
        row_bytes = self.padded * (inputs.query.element_size() + (inputs.index is not None))
        whole = tiles.gradient_rows
        fitting = max(1, SCRATCH_BYTES // row_bytes // whole) * whole
        self.chunk_rows = min(fitting, triton.cdiv(self.sq, whole) * whole)
        self.low, self.high = _tile_ranges(inputs.rows, tiles.rows, self.sk)
        self.scratch = inputs.query.new_empty(self.chunk_rows if self.gradient else 0, self.padded)
        self._describe()

    def _describe(self) -> None:
        """Descriptors of the inputs, and the options that all kernels share."""
        inputs, rows, keys = self.inputs, self.tiles.rows, self.tiles.keys
        self.q, self.k = _flat(inputs.query, rows, self.d), _flat(inputs.key, keys, self.d)
        self.qi, self.ki = _flat(inputs.q_idx, rows, self.wide), _flat(inputs.k_idx, keys, self.wide)
        self.tall_qi = _flat(inputs.q_idx, self.tiles.gradient_rows, self.wide)
        if self.weight is not None:
            weighted = (inputs.q_idx * self.weight[..., None]).to(inputs.q_idx.dtype)
            self.weighted = _flat(weighted, rows, self.wide)
        exact = inputs.query.dtype == torch.float32
        self.tall = {"BM": self.tiles.gradient_rows, "ROWS": rows}
        self.tile = {"BM": rows, "BN": keys, "D": self.wide, "PRECISION": "ieee" if exact else "tf32"}
        self.product_options = {"DI": self.di, "STAGES": 1 if exact else self.tiles.gradient_stages}
        self.two_programs = {"maxnreg": 128} if self.wide <= 128 and inputs.query.is_cuda else {}
        self.skips = {"SELECTED": inputs.index is not None}

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """ce `[b, sq]`, dq `[b, sq, di]` unweighted, dk `[b, sk, di]` weighted, all fp32."""
        new = dict(dtype=torch.float32, device=self.inputs.query.device)
        index_lse, product = (torch.empty(self.b, self.sq, **new) for _ in range(2))
        dq = torch.empty(self.b, self.sq if self.want_dq else 0, self.di, **new)
        dk = torch.zeros(self.b, self.sk if self.weight is not None else 0, self.di, **new)
        for chunk in self._chunks():
            rows = slice(chunk.row0, chunk.row0 + chunk.count)
            self._index_lse(chunk, index_lse[chunk.batch, rows])
            self._sweep(chunk, index_lse[chunk.batch, rows], product[chunk.batch, rows])
            if self.want_dq:
                self._query_gradient(chunk, dq[chunk.batch, rows])
            if self.weight is not None:
                self._key_gradient(chunk, dk[chunk.batch])
        ce = cross_entropy(index_lse, product, self.h)
        return ce, dq.mul_(self.inputs.index_scale), dk.mul_(self.inputs.index_scale)

    def _chunks(self) -> Iterator[_Chunk]:
        for batch in range(self.b):
            # The last chunk sees most keys: started first, it hides the launches of the others.
            for row0 in reversed(range(0, self.sq, self.chunk_rows)):
                count, first = min(self.chunk_rows, self.sq - row0), row0 // self.tiles.rows
                row_tiles, chosen = triton.cdiv(count, self.tiles.rows), None
                if self.inputs.index is not None:
                    index = self.inputs.index[batch, row0 : row0 + count]
                    whole = self.tiles.gradient_rows
                    padded_rows = triton.cdiv(count, whole) * whole
                    chosen = mark_selected(index, padded_rows, self.padded, self.tiles.rows, self.tiles.keys)
                low, high = self.low[batch, first:], self.high[batch, first:]
                yield _Chunk(batch, row0, count, row_tiles, low, high, chosen)

    def _spans(self, span: int) -> int:
        return triton.cdiv(self.sk, span)

    def _parts(self, span: int, *shape: int) -> Tensor:
        return torch.empty(self._spans(span), *shape, dtype=torch.float32, device=self.inputs.query.device)

    def _index_lse(self, chunk: _Chunk, out: Tensor) -> None:
        """Write `[count]` log2 of the sum of exp(I) over the keys of each row, -inf in empty rows."""
        span, rows = self.tiles.gradient_span, self.inputs.rows
        parts = self._parts(span, chunk.count)
        kd_sweep.index_lse[(triton.cdiv(chunk.count, self.tiles.gradient_rows), self._spans(span))](
            self.tall_qi, self.ki, rows.start, rows.end, chunk.low, chunk.high, chunk.mask, chunk.flags,
            parts, chunk.batch, chunk.row0, chunk.count, self.sq, self.sk, self.padded,
            self.inputs.index_scale * LOG2E, SPAN=span, num_warps=max(4, self.tiles.gradient_rows // 16),
            **self.tile | self.tall, **self.skips, **self.two_programs,
        )  # fmt: skip
        blocks = triton.cdiv(chunk.count, 256)
        kd_sweep.join_spans[(blocks,)](parts, out, chunk.count, parts.shape[0], BLOCK=256)

    def _sweep(self, chunk: _Chunk, index_lse: Tensor, out: Tensor) -> None:
        """Fill the scratch; write the rows' sums of A I, `[count]`."""
        inputs, tiles = self.inputs, self.tiles
        product, spans = self._parts(tiles.span, chunk.count), self._spans(tiles.span)
        ranges = inputs.rows.start, inputs.rows.end, chunk.low, chunk.high
        where = chunk.batch, chunk.row0, chunk.count, self.sq, self.sk, self.padded, chunk.row_tiles, spans
        scales = inputs.scale * LOG2E, inputs.index_scale * LOG2E
        shape = {"KV": self.kv, "G": self.h // self.kv, "SPAN": tiles.span, "BAND": tiles.band}
        limit = {} if tiles.registers is None else {"maxnreg": tiles.registers}
        kd_sweep.sweep[(chunk.row_tiles * spans,)](
            self.q, self.k, inputs.lse, self.qi, self.ki, index_lse, *ranges, chunk.mask, chunk.flags,
            self.scratch, product, *where, *scales,
            HEAD=self.d, GRADIENT=self.gradient, STAGES=tiles.stages, num_warps=tiles.warps,
            **shape, **self.tile, **self.skips, **limit,
        )  # fmt: skip
        torch.sum(product, 0, out=out)

    def _query_gradient(self, chunk: _Chunk, dq: Tensor) -> None:
        """Write dq `[count, di]` from the scratch."""
        span = self.tiles.gradient_span
        parts = self._parts(span, chunk.count, self.di)
        kd_sweep.query_gradient[(triton.cdiv(chunk.count, self.tiles.gradient_rows), self._spans(span))](
            self.scratch, self.ki, chunk.low, chunk.high, chunk.flags, parts, chunk.batch, chunk.count,
            self.sk, self.padded,
            SPAN=span, num_warps=max(4, self.tiles.gradient_rows // 16), **self.tile | self.tall,
            **self.product_options, **self.skips,
        )  # fmt: skip
        torch.sum(parts, 0, out=dq)

    def _key_gradient(self, chunk: _Chunk, dk: Tensor) -> None:
        """Add the chunk's rows to dk `[sk, di]`."""
        kd_sweep.key_gradient[(self.padded // self.tiles.keys,)](
            self.scratch, self.weighted, chunk.low, chunk.high, chunk.flags, dk, chunk.batch, chunk.row0,
            self.sq, self.sk, self.padded, chunk.row_tiles, TILES=triton.next_power_of_2(chunk.row_tiles),
            num_warps=8, **self.tile, **self.product_options, **self.skips, **self.two_programs,
        )  # fmt: skip
