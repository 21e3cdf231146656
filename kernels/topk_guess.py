"""A lower bound for the k-th best score of each row, guessed from a sample of the keys, in Triton.

Owns the sample and its rank; owns no exactness: a wrong guess costs the row's recovery and nothing else.

    one key of every 8 or 16 (its place in them is hashed, so that no period in the keys can hide from it)
    q_idx x sampled keys -> bf16 samples [rows, sk / 8]; their `rank`-th largest value is the bound

With `rank` 6 standard deviations above k / 8, fewer than one row in 10^9 has fewer than k scores above it,
and as few have more than the buffer holds: a row that fails is recovered exactly, but a single one takes tens
of milliseconds at 128K. Work: 1/8 of a score pass, 2 B written and read a sample, about 10 compares a sample
for the bisection.
Axes: sq queries, sk keys, di index dim, k selected, c sampled keys.
"""

import math

import triton
import triton.language as tl

from megatron_clsa.kernels.topk_tile import load_rows, load_vectors

LONG = 65536  # keys from which one in 16 is scored: the guess costs half, the candidates are an eighth more
DEVIATIONS = 6.0
TOLERANCE = 1 / 16  # the bisection stops at a rank of at most (1 + TOLERANCE) x the wanted one
LARGEST = tl.constexpr(3.0e38)


def sample_stride(num_keys: int) -> int:
    """One key of how many is scored for the guess: a power of two."""
    return 16 if num_keys >= LONG else 8


def sample_rank(k: int, stride: int) -> int:
    """How many samples must reach the bound so that k keys do."""
    return math.ceil(k / stride + DEVIATIONS * math.sqrt(k / stride)) + 4


def candidate_capacity(k: int, stride: int) -> int:
    """Slots a row needs for the scores above its bound, 6 deviations included: a multiple of 64."""
    rank = sample_rank(k, stride) * (1 + TOLERANCE)
    return -(-math.ceil(stride * (rank + DEVIATIONS * math.sqrt(rank))) // 64) * 64


@triton.jit
def sample_scores(
    Q, K, START, END, SAMPLES, row0, chunk, columns, width, sq, sk, capacity,
    DI: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BM rows x BC sampled keys; only tiles that a row with more than `capacity` keys sees are computed."""
    column, tile, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    local = tile * BM + tl.arange(0, BM)
    start, end = load_rows(START, END, batch, row0 + local, local < chunk, sq, sk)
    long = end - start >= capacity
    first = tl.min(tl.where(long, start, sk))
    last = tl.max(tl.where(long, end, -1))
    if (column * BC * STRIDE <= last) & ((column + 1) * BC * STRIDE > first):
        c = column * BC + tl.arange(0, BC)
        j = c * STRIDE + ((c ^ (c >> 3) ^ (c >> 6)) & (STRIDE - 1))
        queries = Q + batch.to(tl.int64) * sq * DI
        keys = K + batch.to(tl.int64) * sk * DI
        q = load_vectors(queries, row0 + local, local < chunk, DI, D, True)
        key = load_vectors(keys, j, c < columns, DI, D, True)
        score = tl.dot(q, tl.trans(key), input_precision=PRECISION)
        out = SAMPLES + (batch.to(tl.int64) * chunk + local)[:, None] * width + c[None, :]
        tl.store(out, score.to(tl.bfloat16), mask=(local < chunk)[:, None] & (c < columns)[None, :])


@triton.jit
def _bisect(samples, first, stop, rank, enough, BLOCK: tl.constexpr):
    """A value that at least `rank` samples of `first..stop-1` reach, at most `enough` if ties allow it.

    Bisection guided by the counts, after three steps that suit the tail of a normal distribution.
    """
    c = first // 8 * 8 + tl.arange(0, BLOCK)  # loads of 16 bytes
    inside = (c >= first) & (c < stop)
    x = tl.load(samples + c, mask=c < (stop + 7) // 8 * 8, other=0.0).to(tl.float32)
    x = tl.where(inside, x, float("nan"))
    low = tl.maximum(tl.min(tl.where(x == x, x, LARGEST)), -LARGEST)
    high = tl.minimum(tl.max(tl.where(x == x, x, -LARGEST)), LARGEST)
    above_low, above_high, step = stop - first, 0, 0
    while step < 24:
        share = (above_low - (rank + enough) * 0.5) / (above_low - above_high)
        share = tl.where((step < 3) | (step % 3 == 2), tl.where(step == 0, 0.7, 0.5), share)
        middle = low + (high * 0.5 - low * 0.5) * (2.0 * tl.minimum(tl.maximum(share, 0.02), 0.98))
        reach = tl.sum((x >= middle).to(tl.int32))
        low, high = tl.where(reach >= rank, middle, low), tl.where(reach >= rank, high, middle)
        above_low, above_high = (
            tl.where(reach >= rank, reach, above_low),
            tl.where(reach >= rank, above_high, reach),
        )
        step = tl.where((reach >= rank) & (reach <= enough), 24, step + 1)
    return low


@triton.jit
def guess_bound(
    SAMPLES, START, END, BOUND, row0, columns, width, rank, enough, sq, sk, capacity,
    STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: the bound from the samples that stand for keys it sees; -inf where all fit the buffer."""
    row, batch = tl.program_id(0), tl.program_id(1)
    start, end = load_rows(START, END, batch, row0 + row, True, sq, sk)
    bound = float("-inf")
    if end - start >= capacity:
        first = (start + STRIDE - 1) // STRIDE
        stop = tl.minimum((end + 1) // STRIDE, columns)
        samples = SAMPLES + (batch.to(tl.int64) * tl.num_programs(0) + row) * width
        if stop - first // 8 * 8 <= BLOCK // 4:
            bound = _bisect(samples, first, stop, rank, enough, BLOCK // 4)
        elif stop - first // 8 * 8 <= BLOCK // 2:
            bound = _bisect(samples, first, stop, rank, enough, BLOCK // 2)
        else:
            bound = _bisect(samples, first, stop, rank, enough, BLOCK)
    tl.store(BOUND + batch.to(tl.int64) * tl.num_programs(0) + row, bound)
