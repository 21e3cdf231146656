"""The sweep of `kd_union.py` for Hopper, in Gluon: the same sums in the same order, faster.

Owns the order of copies, products and exponentials. A tile's queries of all heads stay in shared memory.
The keys of a block come as steps, one KV head each and then the indexer's, through a ring of three buffers:
the copy of the step after next is on its way, the product of this one runs, and the exponentials of the one
before are made beside it.

Axes: n keys of a block (16 a warp), c queries of a tile (16 columns), h heads, g KV heads, D dim of heads and
of the indexer.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

COLUMNS = gl.constexpr(16)  # of a head: its queries, padded
WIDE = gl.constexpr(4)  # heads of the larger product


@gluon.jit
def _queries(tile, tiles, sq, c, T: gl.constexpr):
    """Of columns `c`: the row of `[b * sq]` and the position of each one's query, and whether it exists."""
    query = (tile % tiles) * T + c
    real = (c < T) & (query < sq)
    query = gl.minimum(query, sq - 1)
    return (tile // tiles).to(gl.int64) * sq + query, query.to(gl.int64), real


@gluon.jit
def _positions(KEYS, p, length, n):
    """Keys `[n]` of the block at row `p` of a union of `length` rows; key 0 past the last."""
    return gl.load(KEYS + p + n, mask=p + n < length, other=0)


@gluon.jit
def _gather(shared, base, j, stride, d):
    """Start the copy of the vectors `j` to shared memory, as a group of its own."""
    async_copy.async_copy_global_to_shared(shared, base + (j.to(gl.int64) * stride)[:, None] + d[None, :])
    async_copy.commit_group()


@gluon.jit
def _keep_heads(
    vectors, statistics, Q, LSE, tile, tiles, sq, first, last, g, q_b, q_s, q_h,
    H: gl.constexpr, N: gl.constexpr, T: gl.constexpr, D: gl.constexpr, LOAD: gl.constexpr,
):  # fmt: skip
    """Heads `first .. last` to `vectors [g, N, D]`, their LSE to `statistics [g, N]`, +inf where none is."""
    r = gl.arange(0, N, gl.SliceLayout(1, LOAD))
    d = gl.arange(0, D, gl.SliceLayout(0, LOAD))
    batch = (tile // tiles).to(gl.int64)
    _, query, real = _queries(tile, tiles, sq, r % COLUMNS, T)
    head = first + r // COLUMNS
    real = real & (head < last)
    at = Q + batch * q_b + (query * q_s + head * q_h)[:, None] + d[None, :]
    vectors.index(g).store(gl.load(at, mask=real[:, None], other=0.0))
    lse = gl.load(LSE + (batch * H + head) * sq + query, mask=real, other=float("inf"))
    statistics.index(g).store(lse)


@gluon.jit
def _probabilities(score, statistics, scale, N: gl.constexpr, SCORES: gl.constexpr, SUM: gl.constexpr):
    """`[n, c]`: of N columns of scores, the heads' probabilities added up."""
    lse = statistics.load(gl.SliceLayout(0, SCORES))
    weight = gl.exp2(score * scale - lse[None, :])
    if N == COLUMNS:
        return gl.convert_layout(weight, SUM)
    heads = weight.reshape([score.shape[0], N // COLUMNS, COLUMNS])
    return gl.convert_layout(gl.sum(heads, 1), SUM)


@gluon.jit(do_not_specialize=["tile1", "row0", "tiles", "sq", "sk"])
def union_sweep_hopper(
    Q, K, LSE, QI, WEIGHTED, KI, INDEX_LSE, KEYS, MEMBERS, OFFSETS, PRODUCT, DQ, ROWS,
    scale, index_scale, tile1, row0, tiles, sq, sk, q_b, q_s, q_h, k_b, k_s, k_h,
    KV: gl.constexpr, G: gl.constexpr, T: gl.constexpr, D: gl.constexpr, BLOCK: gl.constexpr,
    WANT_DQ: gl.constexpr, WANT_DK: gl.constexpr,
):  # fmt: skip
    """As `kd_union.union_sweep`, for groups of 4 to 7 heads; a warp for every 16 keys of a block."""
    WARPS: gl.constexpr = BLOCK // 16
    REST: gl.constexpr = 0 if G == 4 else (16 if G == 5 else (32 if G == 6 else 64))
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 64, 16])
    TAIL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, max(REST, 16), 16])
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, COLUMNS, 16])
    VECTORS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    OF_KEYS: gl.constexpr = gl.SliceLayout(1, LOAD)
    dtype: gl.constexpr = Q.dtype.element_ty
    GATHERED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, D], dtype)
    HEADS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
    FEW: gl.constexpr = gl.NVMMASharedLayout.get_default_for([COLUMNS, D], dtype)
    PAIRS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([COLUMNS, BLOCK], dtype)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])

    tile = tile1 - 1 - gl.program_id(0)  # late queries see the most
    begin = gl.load(OFFSETS + tile)
    length = (gl.load(OFFSETS + tile + 1) - begin).to(gl.int32)
    KEYS += begin
    MEMBERS += begin
    K += (tile // tiles).to(gl.int64) * k_b
    KI += (tile // tiles).to(gl.int64) * sk * D

    d = gl.arange(0, D, gl.SliceLayout(0, LOAD))
    at_key = gl.arange(0, BLOCK, OF_KEYS)
    ring = gl.allocate_shared_memory(dtype, [3, BLOCK, D], GATHERED)
    j = _positions(KEYS, 0, length, at_key)
    _gather(ring.index(0), K, j, k_s, d)
    if KV > 1:
        _gather(ring.index(1), K + k_h, j, k_s, d)
    else:
        _gather(ring.index(1), KI, j, D, d)

    wide = gl.allocate_shared_memory(dtype, [KV, 64, D], HEADS)
    wide_lse = gl.allocate_shared_memory(gl.float32, [KV, 64], FLAT)
    for kvh in range(KV):
        _keep_heads(
            wide, wide_lse, Q, LSE, tile, tiles, sq, kvh * G, kvh * G + WIDE, kvh, q_b, q_s, q_h,
            KV * G, 64, T, D, LOAD,
        )  # fmt: skip
    if REST > 0:
        tail = gl.allocate_shared_memory(dtype, [KV, REST, D], HEADS)
        tail_lse = gl.allocate_shared_memory(gl.float32, [KV, REST], FLAT)
        for kvh in range(KV):
            _keep_heads(
                tail, tail_lse, Q, LSE, tile, tiles, sq, kvh * G + WIDE, kvh * G + G, kvh, q_b, q_s, q_h,
                KV * G, REST, T, D, LOAD,
            )  # fmt: skip
    row, _, real = _queries(tile, tiles, sq, gl.arange(0, COLUMNS, OF_KEYS), T)
    at = row[:, None] * D + d[None, :]
    qi = gl.allocate_shared_memory(dtype, [COLUMNS, D], FEW, gl.load(QI + at, mask=real[:, None], other=0.0))
    if WANT_DK:
        weighted = gl.allocate_shared_memory(
            dtype, [COLUMNS, D], FEW, gl.load(WEIGHTED + at, mask=real[:, None], other=0.0)
        )
    pairs = gl.allocate_shared_memory(dtype, [COLUMNS, BLOCK], PAIRS)

    c = gl.arange(0, COLUMNS, gl.SliceLayout(0, SUM))
    n = gl.arange(0, BLOCK, gl.SliceLayout(1, SUM))
    row, _, real = _queries(tile, tiles, sq, c, T)
    index_lse = gl.load(INDEX_LSE + row)
    product = gl.zeros([BLOCK, COLUMNS], gl.float32, SUM)
    dq = gl.zeros([D, COLUMNS], gl.float32, SUM)
    no_scores = gl.zeros([BLOCK, 64], gl.float32, SCORES)
    no_few = gl.zeros([BLOCK, max(REST, 16)], gl.float32, TAIL)
    no_sum = gl.zeros([BLOCK, COLUMNS], gl.float32, SUM)
    step = 0
    for p in range(0, length, BLOCK):
        after = _positions(KEYS, p + BLOCK, length, at_key)
        word = gl.load(MEMBERS + p + n, mask=p + n < length, other=0)
        total, last_score, last_few = no_sum, no_scores, no_few
        for g in gl.static_range(KV):
            async_copy.wait_group(1)  # this step's keys are the older of two
            fence_async_shared()
            gl.thread_barrier()  # after it nobody reads the buffer of the step before
            key = ring.index(step % 3)
            spare = ring.index((step + 2) % 3)
            step += 1
            if g + 2 < KV:
                _gather(spare, K + (g + 2) * k_h, j, k_s, d)
            elif g + 2 == KV:
                _gather(spare, KI, j, D, d)
            else:
                _gather(spare, K, after, k_s, d)
            score = warpgroup_mma(key, wide.index(g).permute((1, 0)), no_scores, use_acc=False, is_async=True)
            if REST > 0:
                few = warpgroup_mma(key, tail.index(g).permute((1, 0)), no_few, use_acc=False, is_async=True)
            if g > 0:
                total += _probabilities(last_score, wide_lse.index(g - 1), scale, 64, SCORES, SUM)
                if REST > 0:
                    total += _probabilities(last_few, tail_lse.index(g - 1), scale, REST, TAIL, SUM)
            if REST > 0:
                last_score, last_few = warpgroup_mma_wait(0, [score, few])
            else:
                last_score = warpgroup_mma_wait(0, [score])
        async_copy.wait_group(1)
        fence_async_shared()
        gl.thread_barrier()
        key = ring.index(step % 3)
        spare = ring.index((step + 2) % 3)
        step += 1
        score = warpgroup_mma(key, qi.permute((1, 0)), no_sum, use_acc=False, is_async=True)
        if KV > 1:
            _gather(spare, K + k_h, after, k_s, d)
        else:
            _gather(spare, KI, after, D, d)
        total += _probabilities(last_score, wide_lse.index(KV - 1), scale, 64, SCORES, SUM)
        if REST > 0:
            total += _probabilities(last_few, tail_lse.index(KV - 1), scale, REST, TAIL, SUM)
        x = warpgroup_mma_wait(0, [score]) * index_scale
        seen = ((word[:, None] >> c[None, :]) & 1) != 0
        total = gl.where(seen, total, 0.0)
        x = gl.where(seen, x, 0.0)
        product += total * x
        if WANT_DQ or WANT_DK:
            dscore = gl.where(seen, KV * G * gl.exp2(x - index_lse[None, :]), 0.0) - total
            dscore = dscore.to(dtype)
        if WANT_DQ:
            pairs.store(dscore.permute((1, 0)))
            fence_async_shared()
            gl.thread_barrier()
            dq = warpgroup_mma(key.permute((1, 0)), pairs.permute((1, 0)), dq, is_async=True)
        if WANT_DK:
            left = gl.convert_layout(dscore, gl.DotOperandLayout(0, VECTORS, 2))
            gradient = warpgroup_mma(left, weighted, gl.zeros([BLOCK, D], gl.float32, VECTORS), use_acc=False)
        if WANT_DQ:
            dq = warpgroup_mma_wait(0, [dq])
        if WANT_DK:
            to = ROWS + (begin - row0 + p + at_key)[:, None] * D + d[None, :]
            gl.store(to, gl.convert_layout(gradient.to(dtype), LOAD), mask=(p + at_key < length)[:, None])
        j = after
    async_copy.wait_group(0)

    gl.store(PRODUCT + row, gl.sum(product, 0), mask=real)
    if WANT_DQ:
        e = gl.arange(0, D, gl.SliceLayout(1, SUM))
        gl.store(DQ + row[None, :] * D + e[:, None], dq, mask=real[None, :])
