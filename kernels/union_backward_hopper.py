"""The walk of `union_backward.py` for Hopper, in Gluon: the same bits in the same rows, faster.

Owns the order of copies and products. A block of 64 gathered keys is five products, each of which needs the
one before or a copy. Here K and V of the next block are on their way while this one is computed, dP runs
beside the exponentials, dQ beside the store of dV, and the rows of dK and dV leave through shared memory by
the bulk copy engine, whose stores are whole lines and need no addresses: registers are what is short. dV
waits for the gradients of the scores, although it could run beside them: so at most two results of `[64, D]`
are alive at a time and the loop spills next to nothing, which is worth more than that (docs/kernels.md).
Axes: R rows of a tile, n keys of a block, D head dim.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _tile_rows(tile, tiles, kvh, sq, G: gl.constexpr, T: gl.constexpr, R: gl.constexpr, LAYOUT: gl.constexpr):
    """Of each row: its query's place in the tile, position and head, and whether it exists."""
    r = gl.arange(0, R, LAYOUT)
    place = r // G
    query = (tile % tiles) * T + place
    return place, query.to(gl.int64), kvh * G + r % G, (place < T) & (query < sq)


@gluon.jit
def _positions(KEYS, p, length, BLOCK: gl.constexpr, LOAD: gl.constexpr):
    """Keys of the block at row `p` of a union of `length` rows; key 0 past the last."""
    at = p + gl.arange(0, BLOCK, gl.SliceLayout(1, LOAD))
    return gl.load(KEYS + at, mask=at < length, other=0)


@gluon.jit
def _gather(shared, base, j, stride, D: gl.constexpr, LOAD: gl.constexpr):
    """Start the copy of the vectors `j` of a head to shared memory, as a group of its own."""
    d = gl.arange(0, D, gl.SliceLayout(0, LOAD))
    async_copy.async_copy_global_to_shared(shared, base + (j.to(gl.int64) * stride)[:, None] + d[None, :])
    async_copy.commit_group()


@gluon.jit
def _send(rows, staging, gradient, p, column):
    """Hand `gradient [n, D]` to the bulk copy engine, once it has read what `staging` held before."""
    tma.store_wait(0)
    gl.thread_barrier()
    staging.store(gradient.to(staging.dtype))
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(rows, [p, column], staging)


@gluon.jit(do_not_specialize=["tile1", "row0", "tiles", "sq"])
def union_backward_hopper(
    Q, K, V, DOUT, KEYS, MEMBERS, OFFSETS, LSE, DELTA, DQ, rows, scale, tile1, row0, tiles, sq,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, do_b, do_s, do_h,
    G: gl.constexpr, T: gl.constexpr, R: gl.constexpr, D: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """For 64 rows and four warps. `rows`: descriptor of `[p, g * 2 D]` in blocks of `[BLOCK, D]`."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    WIDE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    OF_QUERIES: gl.constexpr = gl.SliceLayout(1, LOAD)
    OF_SCORES: gl.constexpr = gl.SliceLayout(1, SCORES)
    dtype: gl.constexpr = Q.dtype.element_ty
    VECTORS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([R, D], dtype)
    GATHERED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, D], dtype)
    PAIRS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([R, BLOCK], dtype)
    tile, kvh = tile1 - 1 - gl.program_id(0), gl.program_id(1)  # late queries see the most
    groups = gl.num_programs(1)
    batch = (tile // tiles).to(gl.int64)
    begin = gl.multiple_of(gl.load(OFFSETS + tile), BLOCK)
    length = (gl.load(OFFSETS + tile + 1) - begin).to(gl.int32)
    KEYS += begin
    MEMBERS += begin
    row = (begin - row0).to(gl.int32)
    K += batch * k_b + kvh * k_h
    V += batch * v_b + kvh * v_h

    keys = gl.allocate_shared_memory(dtype, [2, BLOCK, D], GATHERED)
    value = gl.allocate_shared_memory(dtype, [BLOCK, D], GATHERED)
    j = _positions(KEYS, 0, length, BLOCK, LOAD)
    _gather(keys.index(0), K, j, k_s, D, LOAD)
    _gather(value, V, j, v_s, D, LOAD)
    j = _positions(KEYS, BLOCK, length, BLOCK, LOAD)

    place, query, head, real = _tile_rows(tile, tiles, kvh, sq, G, T, R, OF_QUERIES)
    d = gl.arange(0, D, gl.SliceLayout(0, LOAD))
    at = Q + (batch * q_b + query * q_s + head * q_h)[:, None] + d[None, :]
    q = gl.allocate_shared_memory(dtype, [R, D], VECTORS, gl.load(at, mask=real[:, None], other=0.0))
    at = DOUT + (batch * do_b + query * do_s + head * do_h)[:, None] + d[None, :]
    dout = gl.allocate_shared_memory(dtype, [R, D], VECTORS, gl.load(at, mask=real[:, None], other=0.0))

    place, query, head, real = _tile_rows(tile, tiles, kvh, sq, G, T, R, OF_SCORES)
    statistic = (batch * groups * G + head) * sq + query
    lse = gl.load(LSE + statistic, mask=real, other=0.0)
    lse = (gl.where(lse == float("-inf"), 0.0, lse) * LOG2_E)[:, None]
    delta = (gl.load(DELTA + statistic, mask=real, other=0.0) * scale)[:, None]
    bit = (gl.full([R], 1, gl.int32, OF_SCORES) << gl.minimum(place, 31))[:, None]

    weights = gl.allocate_shared_memory(dtype, [R, BLOCK], PAIRS)
    dscores = gl.allocate_shared_memory(dtype, [R, BLOCK], PAIRS)
    staging = gl.allocate_shared_memory(dtype, [BLOCK, D], GATHERED)
    no_scores = gl.zeros([R, BLOCK], gl.float32, SCORES)
    no_rows = gl.zeros([BLOCK, D], gl.float32, WIDE)
    dq = gl.zeros([R, D], gl.float32, WIDE)
    n = gl.arange(0, BLOCK, gl.SliceLayout(0, SCORES))
    log2_scale = scale * LOG2_E
    for p in range(0, length, BLOCK):
        turn = p // BLOCK % 2
        key = keys.index(turn)
        word = gl.load(MEMBERS + p + n)[None, :]
        async_copy.wait_group(1)  # K is the older of two
        fence_async_shared()
        gl.thread_barrier()
        score = warpgroup_mma(q, key.permute((1, 0)), no_scores, use_acc=False, is_async=True)
        async_copy.wait_group(0)
        fence_async_shared()
        gl.thread_barrier()
        dweight = warpgroup_mma(dout, value.permute((1, 0)), no_scores, use_acc=False, is_async=True)
        # dQ of the block before was the last to read this buffer, and every warp has waited for it.
        _gather(keys.index(1 - turn), K, j, k_s, D, LOAD)
        score = warpgroup_mma_wait(1, [score])
        weight = gl.exp2(gl.where((word & bit) != 0, score * log2_scale - lse, float("-inf")))
        weights.store(weight.to(dtype))
        dweight = warpgroup_mma_wait(0, [dweight])
        dscores.store((weight * (dweight * scale - delta)).to(dtype))
        fence_async_shared()
        gl.thread_barrier()  # after it nobody reads V of this block
        dvalue = warpgroup_mma(weights.permute((1, 0)), dout, no_rows, use_acc=False, is_async=True)
        dq = warpgroup_mma(dscores, key, dq, is_async=True)
        _gather(value, V, j, v_s, D, LOAD)
        j = _positions(KEYS, p + 2 * BLOCK, length, BLOCK, LOAD)
        dvalue = warpgroup_mma_wait(1, [dvalue])
        _send(rows, staging, dvalue, row + p, (2 * kvh + 1) * D)
        dkey = warpgroup_mma(dscores.permute((1, 0)), q, no_rows, use_acc=False, is_async=True)
        dq, dkey = warpgroup_mma_wait(0, [dq, dkey])
        _send(rows, staging, dkey, row + p, 2 * kvh * D)
    async_copy.wait_group(0)
    tma.store_wait(0)

    place, query, head, real = _tile_rows(tile, tiles, kvh, sq, G, T, R, OF_QUERIES)
    to = DQ + ((batch * sq + query) * groups * G + head)[:, None] * D + d[None, :]
    gl.store(to, gl.convert_layout(dq.to(dtype), LOAD), mask=real[:, None])
