"""Sparse attention backward over a bit mask, without atomics: every gradient has one program that owns it.

Owns three kernels. `pack_rows` puts what the others read into the order of tiles; `masked_query_gradients`
walks a query tile's live key blocks (three products a block); `masked_key_gradients` walks a key tile's live
query tiles (four products a part), which sums the heads of a KV head on the way. Two products are made twice
so that no sum depends on timing.
Axes: b batch, h heads, g KV heads, R rows of a tile, of which a step takes `ROWS`; n keys, d head dim.
"""

import triton
import triton.language as tl

from megatron_clsa.kernels.masked_forward import block_rows, part_rows
from megatron_clsa.kernels.union_forward import infinity_bits, only_members


@triton.jit(do_not_specialize=["tiles", "sq"])
def pack_rows(
    Q, OUT, DOUT, LSE, DLSE, PACKED_Q, PACKED_DOUT, LSE2, DELTA, BIT, tiles, sq,
    q_b, q_s, q_h, o_b, o_s, o_h, do_b, do_s, do_h,
    G: tl.constexpr, T: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """In the order of tiles, `[b, g, t, R]` and zero where a row does not exist: Q, DOUT, the LSE to base 2
    (+inf for rows without a key) and what the softmax's gradient subtracts, `sum_d OUT * DOUT - DLSE`;
    `BIT [R]`."""
    tile, kvh, groups = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch = (tile // tiles).to(tl.int64)
    r, d = tl.arange(0, R), tl.arange(0, D)
    _, query, head, real = part_rows(r, tile % tiles, kvh, sq, G, T)
    row = ((batch * groups + kvh) * tiles + tile % tiles) * R + r
    to = row[:, None] * D + d[None, :]
    at = Q + batch * q_b + (query * q_s + head * q_h)[:, None] + d[None, :]
    tl.store(PACKED_Q + to, tl.load(at, mask=real[:, None], other=0.0))
    at = OUT + batch * o_b + (query * o_s + head * o_h)[:, None] + d[None, :]
    out = tl.load(at, mask=real[:, None], other=0.0).to(tl.float32)
    at = DOUT + batch * do_b + (query * do_s + head * do_h)[:, None] + d[None, :]
    dout = tl.load(at, mask=real[:, None], other=0.0)
    tl.store(PACKED_DOUT + to, dout)
    at = (batch * groups * G + head) * sq + query
    lse = tl.load(LSE + at, mask=real, other=float("-inf"))
    dlse = tl.load(DLSE + at, mask=real, other=0.0)
    tl.store(LSE2 + row, tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634))
    tl.store(DELTA + row, tl.sum(out * dout.to(tl.float32), 1) - dlse)
    if (tile == 0) & (kvh == 0):
        tl.store(BIT + r, tl.where(r // G < T, 1 << tl.minimum(r // G, 31), 0))


@triton.jit(do_not_specialize=["tiles", "sq", "sk"])
def masked_query_gradients(
    Q, DOUT, LSE2, DELTA, K, V, WORDS, OFFSETS, ENTRIES, ORDER, DQ, scale, tiles, sq, sk, width,
    k_b, k_s, k_h, v_b, v_s, v_h,
    G: tl.constexpr, T: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    tile = tl.load(ORDER + tl.program_id(0) // (R // ROWS))
    r = tl.program_id(0) % (R // ROWS) * ROWS + tl.arange(0, ROWS)
    kvh, groups = tl.program_id(1), tl.num_programs(1)
    batch = (tile // tiles).to(tl.int64)
    up, query, head, real = part_rows(r, tile % tiles, kvh, sq, G, T)
    d, n = tl.arange(0, D), tl.arange(0, KEYS)
    row = ((batch * groups + kvh) * tiles + tile % tiles) * R + r
    q, dout = tl.load(Q + row[:, None] * D + d[None, :]), tl.load(DOUT + row[:, None] * D + d[None, :])
    lse, delta = tl.load(LSE2 + row), tl.load(DELTA + row)
    base_k, base_v = K + batch * k_b + kvh * k_h, V + batch * v_b + kvh * v_h
    words = WORDS + tile.to(tl.int64) * width
    dq = tl.zeros([ROWS, D], tl.float32)
    infinity = infinity_bits(scale)
    log2_scale = scale * 1.4426950408889634
    STEPS: tl.constexpr = BLOCK // KEYS
    first, last = tl.load(OFFSETS + tile), tl.load(OFFSETS + tile + 1)
    for i in tl.range(0, (last - first).to(tl.int32) * STEPS, num_stages=STAGES):
        start = tl.load(ENTRIES + first + i // STEPS) * BLOCK + i % STEPS * KEYS
        word = tl.load(words + start + n)
        key = tl.load(block_rows(base_k, start, k_s, sk, n, d, WHOLE))
        value = tl.load(block_rows(base_v, start, v_s, sk, n, d, WHOLE))
        score = tl.dot(q, tl.trans(key), input_precision=PRECISION) * log2_scale - lse[:, None]
        weight = tl.exp2(only_members(score, word[None, :], up[:, None], infinity))
        dweight = tl.dot(dout, tl.trans(value), input_precision=PRECISION)
        dscore = (weight * (dweight - delta[:, None])).to(key.dtype)
        dq = tl.dot(dscore, key, dq, input_precision=PRECISION)
    to = DQ + ((batch * sq + query) * groups * G + head)[:, None] * D + d[None, :]
    tl.store(to, (dq * scale).to(DQ.dtype.element_ty), mask=real[:, None])


@triton.jit(do_not_specialize=["tiles", "sk"])
def masked_key_gradients(
    Q, DOUT, LSE2, DELTA, BIT, K, V, WORDS, OFFSETS, ENTRIES, ORDER, DK, DV, scale, tiles, sk, width,
    k_b, k_s, k_h, v_b, v_s, v_h,
    R: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    own = tl.load(ORDER + tl.program_id(0) // (BLOCK // KEYS))
    kvh, groups = tl.program_id(1), tl.num_programs(1)
    blocks = width // BLOCK
    batch = (own // blocks).to(tl.int64)
    d, n, r = tl.arange(0, D), tl.arange(0, KEYS), tl.arange(0, ROWS)
    j = own % blocks * BLOCK + tl.program_id(0) % (BLOCK // KEYS) * KEYS + n
    key = tl.load(block_rows(K + batch * k_b + kvh * k_h, 0, k_s, sk, j, d, False))
    value = tl.load(block_rows(V + batch * v_b + kvh * v_h, 0, v_s, sk, j, d, False))
    words = WORDS + batch * tiles * width + j
    dkey, dvalue = tl.zeros([KEYS, D], tl.float32), tl.zeros([KEYS, D], tl.float32)
    log2_scale = scale * 1.4426950408889634
    STEPS: tl.constexpr = R // ROWS
    rows = (batch * groups + kvh) * tiles * R
    first, last = tl.load(OFFSETS + own), tl.load(OFFSETS + own + 1)
    for i in tl.range(0, (last - first).to(tl.int32) * STEPS, num_stages=STAGES):
        tile = tl.load(ENTRIES + first + i // STEPS)
        part = i % STEPS * ROWS
        row = rows + tile * R + part
        word, bit = tl.load(words + tile.to(tl.int64) * width), tl.load(BIT + part + r)
        q = tl.load(Q + row * D + (r[:, None] * D + d[None, :]))
        dout = tl.load(DOUT + row * D + (r[:, None] * D + d[None, :]))
        lse, delta = tl.load(LSE2 + row + r), tl.load(DELTA + row + r)
        score = tl.dot(key, tl.trans(q), input_precision=PRECISION) * log2_scale - lse[None, :]
        weight = tl.exp2(tl.where((word[:, None] & bit[None, :]) != 0, score, float("-inf")))
        dvalue = tl.dot(weight.to(dout.dtype), dout, dvalue, input_precision=PRECISION)
        dweight = tl.dot(value, tl.trans(dout), input_precision=PRECISION)
        dscore = (weight * (dweight - delta[None, :])).to(q.dtype)
        dkey = tl.dot(dscore, q, dkey, input_precision=PRECISION)
    to = ((batch * sk + j) * groups + kvh)[:, None] * D + d[None, :]
    tl.store(DK + to, (dkey * scale).to(DK.dtype.element_ty), mask=(j < sk)[:, None])
    tl.store(DV + to, dvalue.to(DV.dtype.element_ty), mask=(j < sk)[:, None])
