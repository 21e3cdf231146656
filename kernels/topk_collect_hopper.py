"""The streaming pass of `topk_collect.py` for Hopper, in Gluon: the same hits in the same slots, faster.

Owns the layout in which hits are stored, and nothing that decides which scores are hits; `choose` and the
interpreter's version are in `topk_collect.py`, and tests hold the two equal.

In the layout of a tensor-core result the 32 lanes of a warp hold 8 rows, so that nearly every hit is a memory
write of its own, and these writes cost three times the scores (H100, 32K). Here a tile is first moved to

    one warp instruction = one row x 32 consecutive keys

in which a vote gives all hits of the 32 keys at once: a lane's slot is the row's count plus the votes up to
its own, the last lane's slot is the row's new count, and a row's hits go to adjacent addresses in one write.
Axes: sq queries, sk keys, k selected.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
)

LINE = gl.constexpr(32)  # keys of one warp instruction
CONSTRAINTS = gl.constexpr("=r,l,f,f,f,f,r,r,r")

# new count <- (address before slot 0, two scores, two bounds, count, lanes up to this one, first position):
# both lines of a tile at once, so that one exchange brings the counts of both to all lanes
APPEND = gl.constexpr("""{
    .reg .pred hit0, hit1; .reg .b32 n0, n1, all, next, j1; .reg .u64 at;
    setp.geu.f32 hit0, $2, $4;
    setp.geu.f32 hit1, $3, $5;
    vote.sync.ballot.b32 n0, hit0, 0xffffffff;
    vote.sync.ballot.b32 n1, hit1, 0xffffffff;
    and.b32 n0, n0, $7;
    and.b32 n1, n1, $7;
    popc.b32 n0, n0;
    popc.b32 n1, n1;
    mad.lo.u32 all, n1, 65536, n0;
    shfl.sync.idx.b32 all, all, 31, 31, 0xffffffff;
    add.u32 n0, n0, $6;
    mad.wide.u32 at, n0, 8, $1;
    @hit0 st.global.v2.b32 [at], {$2, $8};
    and.b32 next, all, 65535;
    add.u32 next, next, $6;
    add.u32 n1, n1, next;
    add.u32 j1, $8, 32;
    mad.wide.u32 at, n1, 8, $1;
    @hit1 st.global.v2.b32 [at], {$3, j1};
    shr.u32 all, all, 16;
    add.u32 $0, next, all;
}""")


@gluon.jit
def _copy_keys(keys, K, first, sk, D: gl.constexpr, BN: gl.constexpr, LOAD: gl.constexpr):
    """Start the copy of keys `first .. first + BN - 1` to shared memory, zeros past the last."""
    j = first + gl.arange(0, BN, gl.SliceLayout(1, LOAD))
    d = gl.arange(0, D, gl.SliceLayout(0, LOAD))
    at = K + (j.to(gl.int64) * D)[:, None] + d[None, :]
    async_copy.async_copy_global_to_shared(keys, at, mask=(j < sk)[:, None] & (d < D)[None, :])
    async_copy.commit_group()


@gluon.jit
def _store_lines(base, x0, x1, b0, b1, used, lanes_up_to, j):
    """Store the hits of two lines `[BM, LINE]`, x0 from position j and x1 after it; the rows' new counts."""
    arguments = [base, x0, x1, b0, b1, used, lanes_up_to, j]
    return gl.inline_asm_elementwise(APPEND, CONSTRAINTS, arguments, gl.int32, is_pure=False, pack=1)


@gluon.jit
def _append(
    score, s, start, end, inside, bound, used, lanes_up_to, column, base,
    BM: gl.constexpr, LINES: gl.constexpr,
):  # fmt: skip
    """Store the hits of a tile `[BM, 2 * LINE]` of keys from `s`, in order; the rows' new counts."""
    x0, x1 = score.reshape([BM, 2, LINE]).permute((0, 2, 1)).split()
    x0, x1 = gl.convert_layout(x0, LINES), gl.convert_layout(x1, LINES)
    j = (s + column)[None, :]
    if inside:
        new = _store_lines(base, x0, x1, bound[:, None], bound[:, None], used, lanes_up_to, j)
    else:
        seen0 = (j >= start[:, None]) & (j <= end[:, None])
        seen1 = (j + LINE >= start[:, None]) & (j + LINE <= end[:, None])
        b0, b1 = gl.where(seen0, bound[:, None], float("inf")), gl.where(seen1, bound[:, None], float("inf"))
        y0, y1 = gl.where(seen0, x0, 0.0), gl.where(seen1, x1, 0.0)
        new = _store_lines(base, y0, y1, b0, b1, used, lanes_up_to, j)
    return new


@gluon.jit
def collect_hopper(
    Q, K, START, END, BOUND, BUFFER, COUNT, row0, chunk, sq, sk, k,
    CAPACITY: gl.constexpr, SLOTS: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """BM rows against all their keys. `used` saturates at CAPACITY + 1, so that a tile ends inside SLOTS."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [BM // 16, 1], [16, BN, 16])
    LINES: gl.constexpr = gl.BlockedLayout([16, 1], [1, 32], [BM // 16, 1], [1, 0])
    ROWS: gl.constexpr = gl.SliceLayout(1, LINES)
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [BM // 16, 1], [1, 0])
    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, D], K.dtype.element_ty)
    tile, batch = gl.num_programs(0) - 1 - gl.program_id(0), gl.program_id(1)  # longest rows first
    local = tile * BM + gl.arange(0, BM, ROWS)
    at = batch.to(gl.int64) * sq + row0 + local
    start = gl.maximum(gl.load(START + at, mask=local < chunk, other=0), 0)
    end = gl.minimum(gl.load(END + at, mask=local < chunk, other=-1), sk - 1)
    long = end - start >= k  # shorter rows select all they see
    start, end = gl.where(long, start, sk), gl.where(long, end, -1)
    bound = gl.load(BOUND + batch.to(gl.int64) * chunk + local, mask=long, other=float("inf"))
    K += batch.to(gl.int64) * sk * D
    base = (BUFFER + (batch.to(gl.int64) * gl.num_programs(0) + tile) * BM * SLOTS - 1).to(gl.int64)

    row = tile * BM + gl.arange(0, BM, gl.SliceLayout(1, LOAD))
    d = gl.arange(0, D, gl.SliceLayout(0, LOAD))
    q_at = Q + ((batch.to(gl.int64) * sq + row0 + row) * D)[:, None] + d[None, :]
    q = gl.allocate_shared_memory(Q.dtype.element_ty, [BM, D], SHARED)
    q.store(gl.load(q_at, mask=(row < chunk)[:, None] & (d < D)[None, :], other=0.0))
    keys = gl.allocate_shared_memory(K.dtype.element_ty, [STAGES, BN, D], SHARED)

    first, last = gl.min(start, 0) // BN * BN, gl.max(end, 0) + 1
    all_start = gl.max(gl.where(long, start, 0), 0)
    all_end = gl.min(gl.where(long, end, sk), 0)
    column = gl.arange(0, LINE, gl.SliceLayout(0, LINES))
    lanes_up_to = ((2 << column) - 1)[None, :]
    empty = (gl.arange(0, BM, ROWS) * SLOTS)[:, None] + (column * 0)[None, :]
    used, limit = empty, empty + (CAPACITY + 1)
    for early in gl.static_range(STAGES - 1):
        _copy_keys(keys.index(early), K, first + early * BN, sk, D, BN, LOAD)
    zeros = gl.zeros([BM, BN], gl.float32, MMA)
    for s in range(first, last, BN):
        stage = (s - first) // BN
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        gl.thread_barrier()
        ahead = stage + STAGES - 1
        _copy_keys(keys.index(ahead % STAGES), K, first + ahead * BN, sk, D, BN, LOAD)
        score = warpgroup_mma(q, keys.index(stage % STAGES).permute((1, 0)), zeros, use_acc=False)
        inside = (s >= all_start) & (s + BN - 1 <= all_end)
        used = _append(score, s, start, end, inside, bound, used, lanes_up_to, column, base, BM, LINES)
        used = gl.minimum(used, limit)
    async_copy.wait_group(0)
    count = gl.max(used - empty, 1)
    gl.store(COUNT + batch.to(gl.int64) * chunk + local, count, mask=local < chunk)
