"""The sweep of `kd_sweep.py` for Hopper, in Gluon: the same tiles of d and the same sums, faster.

Owns the schedule: what is loaded when, and which product runs beside which exponentials. The other version is
held up by the L2 cache (each 64 x 128 tile draws every head's queries and keys again) and by waiting for
each product before its exponentials. Here a program takes 64 rows x 256 keys, which halves the queries, and

    product of head   0    1    2   ..   H-1   the index   the next tile's 0
    exponentials of        0    1   ..   H-2   H-1         the index, and the tile's d

each product runs while the exponentials of the one before it are made; two sets of registers take turns, so
the heads must be even in number. Query tiles come through a ring of STAGES buffers, the keys of a group
through two, by TMA: a buffer is filled anew once both warp groups have passed the product that read it. The
index's queries keep a buffer of their own. The last product of a program is of a tile that nobody uses, so
that all tiles are alike.

Operands are awaited before the running product is: without these branches in between, the assembler moves the
exponentials behind the product. Axes: m rows, n keys of a tile, h heads, g KV heads, d head dim.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _load_queries(Q, ring, full, n, limit, q_row, HEADS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """Start the copy of step n's query tile."""
    stage, wanted = n % STAGES, n < limit
    mbarrier.expect(full.index(stage), Q.block_type.nbytes, pred=wanted)
    tma.async_copy_global_to_shared(
        Q, [q_row, n % HEADS * D], full.index(stage), ring.index(stage), pred=wanted
    )


@gluon.jit
def _tile_key(ORDER, low, i, BN: gl.constexpr, SELECTED: gl.constexpr):
    """First key of the program's i-th tile: one after the other, or as ORDER lists them from `low` on."""
    if SELECTED:
        return gl.load(ORDER + low + i) * BN
    else:
        return low + i * BN


@gluon.jit
def _load_keys(
    K, KI, ORDER, ring, full, m, limit, first_row, low,
    KV: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, SELECTED: gl.constexpr,
):  # fmt: skip
    """Start the copy of the m-th group of keys: each tile has KV groups and the index's keys."""
    group, tile, buffer, wanted = m % (KV + 1), m // (KV + 1), m % 2, m < limit
    row = first_row + _tile_key(ORDER, low, tile, BN, SELECTED)
    mbarrier.expect(full.index(buffer), K.block_type.nbytes, pred=wanted)
    tma.async_copy_global_to_shared(
        K, [row, group * D], full.index(buffer), ring.index(buffer), pred=wanted & (group < KV)
    )
    tma.async_copy_global_to_shared(
        KI, [row, 0], full.index(buffer), ring.index(buffer), pred=wanted & (group == KV)
    )


@gluon.jit
def _await(q_full, k_full, n, m, index, STAGES: gl.constexpr):
    """Wait for the operands of step n, or of the index's queries, and the m-th keys."""
    stage = gl.where(index, STAGES, n % STAGES)
    mbarrier.wait(q_full.index(stage), gl.where(index, 0, (n // STAGES) & 1))
    mbarrier.wait(k_full.index(m % 2), (m // 2) & 1)


@gluon.jit
def _multiply(queries, keys, n, m, index, score, STAGES: gl.constexpr):
    """Start the product of step n, or of the index's queries, with the m-th keys, in the place of `score`."""
    stage = gl.where(index, STAGES, n % STAGES)
    k = keys.index(m % 2).permute((1, 0))
    return warpgroup_mma(queries.index(stage), k, score, use_acc=False, is_async=True)


@gluon.jit
def sweep_hopper(
    Q, K, LSE, QI, KI, INDEX_LSE, START, END, LOW, HIGH, MASK, ORDER, COUNTS, SCRATCH, PRODUCT,
    batch, row0, chunk, sq, sk, padded, tiles, spans, scale, index_scale,
    KV: gl.constexpr, G: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    SPAN: gl.constexpr, BAND: gl.constexpr, SELECTED: gl.constexpr, GRADIENT: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """As `kd_sweep.sweep`; HEAD and the index's dim are D, all tiles 16-bit floats.

    With SELECTED, a row tile's key tiles are the first COUNTS `[row tiles]` of its part of ORDER (all parts
    one after the other, padded / BN numbers each), and a span is SPAN / BN of these.
    """
    HEADS: gl.constexpr = KV * G
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [BM // 16, 2], [16, BN // 2, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, MMA)
    batch = gl.cast(batch, gl.int32)
    pid = gl.program_id(0)
    band = pid // (BAND * spans)
    width = gl.minimum(tiles - band * BAND, BAND)
    tile = band * BAND + pid % (BAND * spans) % width
    span = pid % (BAND * spans) // width
    local = tile * BM + gl.arange(0, BM, ROWS)
    inside = local < chunk
    if SELECTED:
        low = tile * (padded // BN) + span * (SPAN // BN)
        count = gl.minimum(gl.load(COUNTS + tile) - span * (SPAN // BN), SPAN // BN)
    else:
        low = gl.maximum(gl.load(LOW + tile), span * SPAN) // BN * BN
        high = gl.minimum(gl.load(HIGH + tile), (span + 1) * SPAN)
        count = (high - low + BN - 1) // BN
    product = gl.zeros([BM], gl.float32, ROWS)
    if count > 0:
        steps, groups = count * HEADS + 1, count * (KV + 1) + 1
        q_row, k_row = batch * sq + row0 + tile * BM, batch * sk
        queries = gl.allocate_shared_memory(Q.dtype, [STAGES + 1, BM, D], Q.layout)
        keys = gl.allocate_shared_memory(K.dtype, [2, BN, D], K.layout)
        q_full = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
        k_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES + 1):
            mbarrier.init(q_full.index(i), count=1)
        for i in gl.static_range(2):
            mbarrier.init(k_full.index(i), count=1)
        gl.thread_barrier()
        _load_queries(Q, queries, q_full, 0, steps, q_row, HEADS, D, STAGES)
        for i in gl.static_range(2):
            _load_keys(K, KI, ORDER, keys, k_full, i, groups, k_row, low, KV, D, BN, SELECTED)
        for i in gl.static_range(1, STAGES):
            _load_queries(Q, queries, q_full, i, steps, q_row, HEADS, D, STAGES)
        mbarrier.expect(q_full.index(STAGES), QI.block_type.nbytes)
        tma.async_copy_global_to_shared(QI, [q_row, 0], q_full.index(STAGES), queries.index(STAGES))

        at = batch.to(gl.int64) * sq + row0 + local
        start = gl.maximum(gl.load(START + at, mask=inside, other=0), 0)
        end = gl.minimum(gl.load(END + at, mask=inside, other=-1), sk - 1)
        index_lse = gl.load(INDEX_LSE + local, mask=inside, other=float("inf"))
        lse_at = LSE + batch.to(gl.int64) * HEADS * sq + row0 + local
        column = gl.arange(0, BN, gl.SliceLayout(0, MMA))
        zeros = gl.zeros([BM, BN], gl.float32, MMA)
        score_b = zeros
        n, m = low * 0, low * 0
        lse_a = gl.load(lse_at, mask=inside, other=float("inf"))
        _await(q_full, k_full, n, m, False, STAGES)
        running = _multiply(queries, keys, n, m, False, zeros, STAGES)
        _await(q_full, k_full, n + 1, m + 1 // G, False, STAGES)
        score_a = warpgroup_mma_wait(0, deps=[running])
        for i in range(count):
            total = zeros
            for pair in range(HEADS // 2):
                head = 2 * pair  # its product is made: start the next one's, then use it
                group = m + (head + 1) // G
                last = head + 2 == HEADS
                other = _multiply(queries, keys, n + 1, group, False, score_b, STAGES)
                lse_b = gl.load(lse_at + (head + 1).to(gl.int64) * sq, mask=inside, other=float("inf"))
                gl.thread_barrier()
                _load_queries(Q, queries, q_full, n + STAGES, steps, q_row, HEADS, D, STAGES)
                if (head + 1) % G == 0:
                    _load_keys(K, KI, ORDER, keys, k_full, group + 1, groups, k_row, low, KV, D, BN, SELECTED)
                total += gl.exp2(score_a * scale - lse_a[:, None])
                group = m + (head + 2) // G  # of the index, after the last head
                _await(q_full, k_full, n + 2, group, last, STAGES)
                score_b, total = warpgroup_mma_wait(0, deps=[other, total])

                running = _multiply(queries, keys, n + 2, group, last, score_a, STAGES)
                next_lse = lse_at + gl.where(last, 0, head + 2).to(gl.int64) * sq
                lse_a = gl.load(next_lse, mask=inside, other=float("inf"))
                gl.thread_barrier()
                _load_queries(Q, queries, q_full, n + 1 + STAGES, steps, q_row, HEADS, D, STAGES)
                if (head + 2) % G == 0:
                    _load_keys(K, KI, ORDER, keys, k_full, group + 1, groups, k_row, low, KV, D, BN, SELECTED)
                total += gl.exp2(score_b * scale - lse_b[:, None])
                n += 2
                following = gl.where(last, KV + 1, (head + 3) // G)
                _await(q_full, k_full, n + 1 - last.to(gl.int32), m + following, False, STAGES)
                score_a, total = warpgroup_mma_wait(0, deps=[running, total])

            m += KV + 1  # the index's product is made: start the next tile's first head
            other = _multiply(queries, keys, n, m, False, score_b, STAGES)
            gl.thread_barrier()
            _load_keys(K, KI, ORDER, keys, k_full, m + 1, groups, k_row, low, KV, D, BN, SELECTED)
            j = _tile_key(ORDER, low, i, BN, SELECTED) + column
            seen = (j[None, :] >= start[:, None]) & (j[None, :] <= end[:, None])
            if SELECTED:
                chosen = gl.load(MASK + local.to(gl.int64)[:, None] * padded + j[None, :])
                seen = seen & (chosen != 0)
            total = gl.where(seen, total, 0.0)
            x = gl.where(seen, score_a * index_scale, 0.0)
            if GRADIENT:
                d = gl.where(seen, HEADS * gl.exp2(x - index_lse[:, None]), 0.0) - total
                out = SCRATCH + local.to(gl.int64)[:, None] * padded + j[None, :]
                gl.store(out, d.to(SCRATCH.dtype.element_ty))
            product += gl.sum(total * x, 1)
            if i + 1 < count:
                _await(q_full, k_full, n + 1, m + 1 // G, False, STAGES)
            score_a = warpgroup_mma_wait(0, deps=[other])
    gl.store(PRODUCT + span.to(gl.int64) * chunk + local, product, mask=inside)
