"""One streaming pass of all index scores that keeps those above each row's bound, and the exact choice of k.

Owns the candidate buffer and its order; the bound is a guess (`topk_guess.py`), and rows that it fails for
are left to `topk_recover.py`.

    for each 64-row tile, keys ascending:   score = q . k         tensor cores
                                            hit = score >= bound  one compare a pair
                                            slot = used + hit x triangle of ones     tensor cores
                                            buffer[row, slot] = (position, score)    hits only

A running count by tensor cores leaves one compare, one conversion, one address and one predicated store a
pair. The count starts at 2^23, where the bits of an fp32 number are the number: no conversion to int.
Axes: sq queries, sk keys, k selected, c candidates of a row.
"""

import triton
import triton.language as tl

from megatron_clsa.kernels.topk_tile import load_rows, load_vectors, ordered, score_tile, unordered

COUNT_ZERO = tl.constexpr(8388608.0)  # 2^23
COUNT_BITS = tl.constexpr(0x4B000000)  # its bits

# (address of slot 0, slot, position, score, hit): written by hand because Triton would first move every
# address, value and mask through shared memory into the layout of a coalesced store, which this is not.
STORE_HIT = tl.constexpr("""{
    .reg .pred hit; .reg .u64 at;
    setp.ne.s32 hit, $5, 0;
    mad.wide.u32 at, $2, 8, $1;
    @hit st.global.v2.b32 [at], {$4, $3};
    mov.u32 $0, 0;
}""")

STORE_CHOSEN = tl.constexpr("""{
    .reg .pred chosen; .reg .u64 at;
    setp.ne.s32 chosen, $4, 0;
    mad.wide.s32 at, $2, 4, $1;
    @chosen st.global.b32 [at], $3;
    mov.u32 $0, 0;
}""")


@triton.jit
def _store_hits(buffer, slot, j, score, hit, NATIVE: tl.constexpr):
    """buffer[slot] = (score, position j) where hit, slot as the bits of a count; NATIVE: not interpreted."""
    bits = slot.to(tl.int32, bitcast=True)
    j = tl.broadcast_to(j[None, :], score.shape)
    if NATIVE:
        zero = buffer.to(tl.int64) - COUNT_BITS * 8
        arguments = [zero, bits, j, score, hit.to(tl.int32)]
        tl.inline_asm_elementwise(STORE_HIT, "=r,l,r,r,f,r", arguments, tl.int32, is_pure=False, pack=1)
    else:
        entry = (j.to(tl.int64) << 32) | score.to(tl.uint32, bitcast=True).to(tl.int64)
        tl.store(buffer + (bits - COUNT_BITS), entry, mask=hit)


@triton.jit
def _append(
    q, K, start, end, bound, buffer, used, low, high, sk, limit,
    DI: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Append the hits among keys `low..high-1`; `used` is 2^23 + the slot of each row's last entry."""
    n = tl.arange(0, BN)
    triangle = (n[:, None] <= n[None, :]).to(tl.float16)
    for s in tl.range(low, high, BN, num_stages=STAGES):
        j = s + n
        score = score_tile(q, K, j, sk, DI, D, MASKED, PRECISION)
        hit = (score < bound[:, None]) == 0  # NaN is a hit: it counts as -inf, not as absent
        if MASKED:
            hit = hit & (j[None, :] >= start[:, None]) & (j[None, :] <= end[:, None])
        slot = tl.dot(hit.to(tl.float16), triangle, tl.broadcast_to(used[:, None], score.shape))
        _store_hits(buffer, slot, j, score, hit, NATIVE)
        used = tl.minimum(used + tl.sum(hit.to(tl.float32), 1), limit)
    return used


@triton.jit
def collect(
    Q, K, START, END, BOUND, BUFFER, COUNT, row0, chunk, sq, sk, k,
    CAPACITY: tl.constexpr, SLOTS: tl.constexpr, DI: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """BM rows against all their keys. `used` saturates at CAPACITY + 1, so that a tile ends inside SLOTS."""
    tile, batch = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)  # longest rows first
    local = tile * BM + tl.arange(0, BM)
    start, end = load_rows(START, END, batch, row0 + local, local < chunk, sq, sk)
    long = end - start >= k  # shorter rows select all they see
    start, end = tl.where(long, start, sk), tl.where(long, end, -1)
    bound = tl.load(BOUND + batch.to(tl.int64) * chunk + local, mask=long, other=float("inf"))
    queries = Q + batch.to(tl.int64) * sq * DI
    keys = K + batch.to(tl.int64) * sk * DI
    q = load_vectors(queries, row0 + local, long, DI, D, True)
    buffer = BUFFER + (batch.to(tl.int64) * tl.num_programs(0) + tile) * BM * SLOTS
    none = COUNT_ZERO - 1.0 + (tl.arange(0, BM) * SLOTS).to(tl.float32)
    used, limit = none, none + (CAPACITY + 1)

    first, last = tl.min(start) // BN * BN, tl.max(end) + 1
    all_see = tl.max(tl.where(long, start, 0))
    all_end = tl.min(tl.where(long, end, sk)) + 1
    full_low = tl.minimum((all_see + BN - 1) // BN * BN, (last + BN - 1) // BN * BN)
    full_high = tl.maximum(all_end // BN * BN, full_low)
    used = _append(q, keys, start, end, bound, buffer, used, first, full_low, sk, limit,
                   DI, D, BN, True, PRECISION, STAGES, NATIVE)  # fmt: skip
    used = _append(q, keys, start, end, bound, buffer, used, full_low, full_high, sk, limit,
                   DI, D, BN, False, PRECISION, STAGES, NATIVE)  # fmt: skip
    used = _append(q, keys, start, end, bound, buffer, used, full_high, last, sk, limit,
                   DI, D, BN, True, PRECISION, STAGES, NATIVE)  # fmt: skip
    count = (used - none).to(tl.int32)
    tl.store(COUNT + batch.to(tl.int64) * chunk + local, count, mask=local < chunk)


@triton.jit
def _kth_best(x, bound, count, k):
    """A value that just k of the candidates `x` reach, or the k-th best if ties forbid it; NaN reaches none.

    Also returns how many are known to reach it: fewer than k only if NaN is among them. Bisection of the
    ordered bits between `low` (reached by at least k) and `high` (by fewer), guided by the counts: the first
    step goes where the k-th of a guessed buffer mostly is, every third step halves.
    """
    low = ordered(bound).to(tl.int64)
    high = ordered(tl.max(tl.where(x == x, x, float("-inf")))).to(tl.int64) + 1
    above_low = tl.where(bound == float("-inf"), count, tl.sum((x >= bound).to(tl.int32)))
    above_high, step = 0, 0
    while (high - low > 1) & (above_low > k):
        share = (above_low - k).to(tl.float32) / (above_low - above_high)
        share = tl.where(step == 0, 0.08, tl.where(step % 3 == 2, 0.5, share))
        skip = ((high - low).to(tl.float32) * share).to(tl.int64)
        middle = low + tl.minimum(tl.maximum(skip, 1), high - low - 1)
        reach = tl.sum((x >= unordered(middle.to(tl.int32))).to(tl.int32))
        low, high = tl.where(reach >= k, middle, low), tl.where(reach >= k, high, middle)
        above_low, above_high = (
            tl.where(reach >= k, reach, above_low),
            tl.where(reach >= k, above_high, reach),
        )
        step += 1
    return unordered(low.to(tl.int32)), above_low


@triton.jit
def _write_chosen(entries, out, kth, room, count, BLOCK: tl.constexpr, NATIVE: tl.constexpr):
    """Positions of the entries above `kth` and of the first `room` equal to it, ascending."""
    used, ties = 0, 0
    for first in range(0, count, BLOCK):
        c = first + tl.arange(0, BLOCK)
        entry = tl.load(entries + c, mask=c < (count + 1) // 2 * 2, other=0)  # loads of 16 bytes
        x = entry.to(tl.int32).to(tl.float32, bitcast=True)
        x = tl.where(x == x, x, float("-inf"))
        above, tied = (x > kth) & (c < count), (x == kth) & (c < count)
        running = tl.cumsum(above.to(tl.int32) + (tied.to(tl.int32) << 16), 0)
        nth_tie = ties + (running >> 16)
        slot = used + (running & 0xFFFF) + tl.minimum(nth_tie, room) - 1
        chosen, position = above | (tied & (nth_tie <= room)), (entry >> 32).to(tl.int32)
        if NATIVE:
            arguments = [out.to(tl.int64), slot, position, chosen.to(tl.int32)]
            tl.inline_asm_elementwise(STORE_CHOSEN, "=r,l,r,r,r", arguments, tl.int32, is_pure=False, pack=1)
        else:
            tl.store(out + slot, position, mask=chosen)
        both = tl.max(running)  # the last one: neither half ever falls
        used, ties = used + (both & 0xFFFF), ties + (both >> 16)


@triton.jit
def _choose_of(entries, out, bound, count, k, LANES: tl.constexpr, BLOCK: tl.constexpr, NATIVE: tl.constexpr):
    """Write the k best of at most LANES candidates; returns whether that failed (NaN among the k best)."""
    c = tl.arange(0, LANES)
    x = tl.load(entries + c, mask=c < (count + 1) // 2 * 2, other=0).to(tl.int32)
    x = tl.where(c < count, x.to(tl.float32, bitcast=True), float("nan"))
    kth, reach = _kth_best(x, bound, count, k)
    if reach >= k:
        room = k - tl.sum((x > kth).to(tl.int32))
        _write_chosen(entries, out, kth, room, count, BLOCK, NATIVE)
    return reach < k


@triton.jit
def choose(
    BUFFER, COUNT, BOUND, START, END, INDEX, FAILED, row0, chunk, padded, sq, sk, k,
    CAPACITY: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """One row: the exact k best of its candidates, positions ascending; flags a row it cannot serve.

    WIDE is the power of two that holds CAPACITY; with SPLIT most rows fit its half, at half the work.
    """
    row, batch = tl.program_id(0), tl.program_id(1)
    out = INDEX + (batch.to(tl.int64) * sq + row0 + row) * k
    source = batch.to(tl.int64) * chunk + row
    start, end = load_rows(START, END, batch, row0 + row, True, sq, sk)
    seen = tl.maximum(end - start + 1, 0)
    count, bound = tl.load(COUNT + source), tl.load(BOUND + source)
    failed = (seen > k) & ((count < k) | (count > CAPACITY))
    if seen <= k:
        for first in range(0, k, BLOCK):
            j = first + tl.arange(0, BLOCK)
            tl.store(out + j, tl.where(j < seen, start + j, -1), mask=j < k)
    elif not failed:
        entries = BUFFER + (batch.to(tl.int64) * padded + row) * SLOTS
        if SPLIT:
            if count <= WIDE // 2:
                failed = _choose_of(entries, out, bound, count, k, WIDE // 2, BLOCK, NATIVE)
            else:
                failed = _choose_of(entries, out, bound, count, k, WIDE, BLOCK, NATIVE)
        else:
            failed = _choose_of(entries, out, bound, count, k, WIDE, BLOCK, NATIVE)
    tl.store(FAILED + source, failed.to(tl.int32))
