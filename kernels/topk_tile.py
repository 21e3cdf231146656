"""Loads and scores one tile of the index in Triton, the same way for every kernel of the index.

Owns the tile of queries x keys and the order of scores; owns no selection. All kernels that compare exact
scores call `score_tile` with the same tile sizes, so that a pair has the same bits in each of them.

Axes: q query rows of the tile, n keys of the tile, di index head dim, D its power of two.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-2147483648)  # below the ordered form of every score


@triton.jit
def ordered(x):
    """fp32 -> int32 of the same order; NaN becomes -inf, -0 becomes +0."""
    x = tl.where(x == x, x, float("-inf")) + 0.0
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def unordered(x):
    """The fp32 value of an ordered int32."""
    return (x ^ ((x >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def load_rows(START, END, batch, row, inside, sq, sk):
    """First and last visible key of each row, clamped to the keys; an empty range for rows outside."""
    at = batch.to(tl.int64) * sq + row
    start = tl.load(START + at, mask=inside, other=0)
    end = tl.load(END + at, mask=inside, other=-1)
    return tl.maximum(start, 0), tl.minimum(end, sk - 1)


@triton.jit
def load_vectors(X, row, inside, DI: tl.constexpr, D: tl.constexpr, BOUNDED: tl.constexpr):
    """`[rows, D]` vectors of `X [.., DI]`, zero outside; unless BOUNDED every row is known to be inside."""
    d = tl.arange(0, D)
    at = X + (row.to(tl.int64) * DI)[:, None] + d[None, :]
    if DI != D:
        mask = (d[None, :] < DI) & inside[:, None]
        x = tl.load(at, mask=mask, other=0.0)
    elif BOUNDED:
        x = tl.load(at, mask=inside[:, None], other=0.0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def score_tile(
    q, K, j, sk, DI: tl.constexpr, D: tl.constexpr, BOUNDED: tl.constexpr, PRECISION: tl.constexpr
):
    """`[q, n]` fp32 scores of the queries `q [q, D]` and the keys at positions `j [n]` of `K [sk, DI]`."""
    key = load_vectors(K, j, j < sk, DI, D, BOUNDED)
    return tl.dot(q, tl.trans(key), input_precision=PRECISION)
