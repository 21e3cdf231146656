"""Exact top-k of the rows that a guessed bound failed for, by recomputing their scores, in Triton.

Owns those rows only (all scores equal, thousands of ties, or a guess that was off); no other row is read.
32 passes over a row's keys find the k-th best score bit by bit, one counts the ties, one writes positions.
All passes and `topk_collect.collect` use one tile shape and one instruction, hence the same bits.

Axes: sq queries, sk keys, k selected.
"""

import triton
import triton.language as tl

from megatron_clsa.kernels.topk_tile import LOWEST, load_rows, load_vectors, ordered, score_tile


@triton.jit
def _ordered_tile(q, K, j, start, end, sk, DI: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr):
    """Ordered scores of a tile, LOWEST where the key is not visible (below every score, -inf included)."""
    visible = (j[None, :] >= start[:, None]) & (j[None, :] <= end[:, None])
    return tl.where(visible, ordered(score_tile(q, K, j, sk, DI, D, True, PRECISION)), LOWEST)


@triton.jit
def _reaching(q, K, start, end, value, first, last, sk, BM: tl.constexpr, BN: tl.constexpr, DI: tl.constexpr,
              D: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """How many keys of each row score at least `value` (ordered)."""
    reach = tl.zeros([BM], tl.int32)
    for s in range(first, last, BN):
        x = _ordered_tile(q, K, s + tl.arange(0, BN), start, end, sk, DI, D, PRECISION)
        reach += tl.sum((x >= value[:, None]).to(tl.int32), 1)
    return reach


@triton.jit
def recover(
    Q, K, START, END, FAILED, INDEX, row0, chunk, sq, sk, k,
    DI: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BM rows, if any of them failed."""
    tile, batch = tl.program_id(0), tl.program_id(1)
    local = tile * BM + tl.arange(0, BM)
    failed = tl.load(FAILED + batch.to(tl.int64) * chunk + local, mask=local < chunk, other=0) != 0
    if tl.max(failed.to(tl.int32)) != 0:
        start, end = load_rows(START, END, batch, row0 + local, failed, sq, sk)
        start = tl.where(failed, start, sk)
        keys = K + batch.to(tl.int64) * sk * DI
        q = load_vectors(Q + batch.to(tl.int64) * sq * DI, row0 + local, failed, DI, D, True)
        first, last = tl.min(start) // BN * BN, tl.max(end) + 1
        kth = tl.full([BM], LOWEST, tl.int32)
        for bit in range(32):
            higher = kth + (tl.full([], 1, tl.int32) << (31 - bit))
            reach = _reaching(q, keys, start, end, higher, first, last, sk, BM, BN, DI, D, PRECISION)
            kth = tl.where(reach >= k, higher, kth)
        room = k - _reaching(q, keys, start, end, kth + 1, first, last, sk, BM, BN, DI, D, PRECISION)
        out = INDEX + ((batch.to(tl.int64) * sq + row0 + local) * k)[:, None]
        used, ties = tl.zeros([BM], tl.int32), tl.zeros([BM], tl.int32)
        for s in range(first, last, BN):
            j = s + tl.arange(0, BN)
            x = _ordered_tile(q, keys, j, start, end, sk, DI, D, PRECISION)
            tied = x == kth[:, None]
            nth_tie = ties[:, None] + tl.cumsum(tied.to(tl.int32), 1)
            chosen = ((x > kth[:, None]) | (tied & (nth_tie <= room[:, None]))) & failed[:, None]
            slot = used[:, None] + tl.cumsum(chosen.to(tl.int32), 1) - 1
            tl.store(out + slot, tl.broadcast_to(j[None, :], x.shape), mask=chosen)
            used += tl.sum(chosen.to(tl.int32), 1)
            ties += tl.sum(tied.to(tl.int32), 1)
