"""Sparse attention backward over a bit mask, without atomics: every gradient has one program that owns it.

Owns three kernels. `row_statistics` prepares what both others read; `masked_query_gradients` walks a query
tile's live key blocks (three products a block); `masked_key_gradients` walks a key tile's live query tiles
(four products a part), which sums the heads of a KV head on the way. Two products are made twice so that no sum
depends on timing.
Axes: b batch, h heads, g KV heads, R rows of a tile, of which a step takes `ROWS`; n keys, d head dim.
"""

import triton
import triton.language as tl

from megatron_clsa.kernels.masked_forward import part_rows


@triton.jit
def row_statistics(
    OUT, DOUT, LSE, DLSE, LSE2, DELTA, tiles, sq, o_b, o_s, o_h, do_b, do_s, do_h,
    G: tl.constexpr, T: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """In the order of tiles, `[b, g, t, R]`: the LSE to base 2, +inf for rows that have no key or do not
    exist, and what the softmax's gradient subtracts: `sum_d OUT * DOUT - DLSE`."""
    tile, kvh, groups = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch = (tile // tiles).to(tl.int64)
    r, d = tl.arange(0, R), tl.arange(0, D)
    _, query, head, real = part_rows(r, tile % tiles, kvh, sq, G, T)
    at = OUT + batch * o_b + (query * o_s + head * o_h)[:, None] + d[None, :]
    out = tl.load(at, mask=real[:, None], other=0.0).to(tl.float32)
    at = DOUT + batch * do_b + (query * do_s + head * do_h)[:, None] + d[None, :]
    dout = tl.load(at, mask=real[:, None], other=0.0).to(tl.float32)
    at = (batch * groups * G + head) * sq + query
    lse = tl.load(LSE + at, mask=real, other=float("-inf"))
    dlse = tl.load(DLSE + at, mask=real, other=0.0)
    to = ((batch * groups + kvh) * tiles + tile % tiles) * R + r
    tl.store(LSE2 + to, tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634))
    tl.store(DELTA + to, tl.sum(out * dout, 1) - dlse)


@triton.jit
def masked_query_gradients(
    Q, K, V, DOUT, WORDS, OFFSETS, ENTRIES, ORDER, LSE2, DELTA, DQ, scale, tiles, sq, sk, width,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, do_b, do_s, do_h,
    G: tl.constexpr, T: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.load(ORDER + tl.program_id(0) // (R // ROWS))
    r = tl.program_id(0) % (R // ROWS) * ROWS + tl.arange(0, ROWS)
    kvh, groups = tl.program_id(1), tl.num_programs(1)
    batch = (tile // tiles).to(tl.int64)
    bit, query, head, real = part_rows(r, tile % tiles, kvh, sq, G, T)
    d, n = tl.arange(0, D), tl.arange(0, KEYS)
    q = tl.load(Q + batch * q_b + (query * q_s + head * q_h)[:, None] + d[None, :])
    dout = tl.load(DOUT + batch * do_b + (query * do_s + head * do_h)[:, None] + d[None, :])
    at = ((batch * groups + kvh) * tiles + tile % tiles) * R + r
    lse, delta = tl.load(LSE2 + at), tl.load(DELTA + at)
    base_k, base_v = K + batch * k_b + kvh * k_h, V + batch * v_b + kvh * v_h
    words = WORDS + tile.to(tl.int64) * width
    dq = tl.zeros([ROWS, D], tl.float32)
    log2_scale = scale * 1.4426950408889634
    STEPS: tl.constexpr = BLOCK // KEYS
    first, last = tl.load(OFFSETS + tile), tl.load(OFFSETS + tile + 1)
    for i in tl.range(0, (last - first).to(tl.int32) * STEPS, num_stages=STAGES):
        j = tl.load(ENTRIES + first + i // STEPS) * BLOCK + i % STEPS * KEYS + n
        word = tl.load(words + j)
        at = tl.minimum(j, sk - 1).to(tl.int64)  # beyond the last key no bit is set
        key = tl.load(base_k + (at * k_s)[:, None] + d[None, :])
        value = tl.load(base_v + (at * v_s)[:, None] + d[None, :])
        score = tl.dot(q, tl.trans(key), input_precision=PRECISION) * log2_scale - lse[:, None]
        weight = tl.exp2(tl.where((word[None, :] & bit[:, None]) != 0, score, float("-inf")))
        dweight = tl.dot(dout, tl.trans(value), input_precision=PRECISION)
        dscore = (weight * (dweight - delta[:, None])).to(key.dtype)
        dq = tl.dot(dscore, key, dq, input_precision=PRECISION)
    to = DQ + ((batch * sq + query) * groups * G + head)[:, None] * D + d[None, :]
    tl.store(to, (dq * scale).to(DQ.dtype.element_ty), mask=real[:, None])


@triton.jit
def masked_key_gradients(
    Q, K, V, DOUT, WORDS, OFFSETS, ENTRIES, ORDER, LSE2, DELTA, DK, DV, scale, tiles, sq, sk, width,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, do_b, do_s, do_h,
    G: tl.constexpr, T: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    own = tl.load(ORDER + tl.program_id(0) // (BLOCK // KEYS))
    kvh, groups = tl.program_id(1), tl.num_programs(1)
    blocks = width // BLOCK
    batch = (own // blocks).to(tl.int64)
    d, n = tl.arange(0, D), tl.arange(0, KEYS)
    j = own % blocks * BLOCK + tl.program_id(0) % (BLOCK // KEYS) * KEYS + n
    at = tl.minimum(j, sk - 1).to(tl.int64)
    key = tl.load(K + batch * k_b + kvh * k_h + (at * k_s)[:, None] + d[None, :])
    value = tl.load(V + batch * v_b + kvh * v_h + (at * v_s)[:, None] + d[None, :])
    base_q, base_do = Q + batch * q_b, DOUT + batch * do_b
    statistics = (batch * groups + kvh) * tiles * R
    words = WORDS + batch * tiles * width + j
    dkey, dvalue = tl.zeros([KEYS, D], tl.float32), tl.zeros([KEYS, D], tl.float32)
    log2_scale = scale * 1.4426950408889634
    STEPS: tl.constexpr = R // ROWS
    first, last = tl.load(OFFSETS + own), tl.load(OFFSETS + own + 1)
    for i in tl.range(0, (last - first).to(tl.int32) * STEPS, num_stages=STAGES):
        tile = tl.load(ENTRIES + first + i // STEPS)
        r = i % STEPS * ROWS + tl.arange(0, ROWS)
        bit, query, head, _ = part_rows(r, tile, kvh, sq, G, T)
        word = tl.load(words + tile.to(tl.int64) * width)
        q = tl.load(base_q + (query * q_s + head * q_h)[:, None] + d[None, :])
        dout = tl.load(base_do + (query * do_s + head * do_h)[:, None] + d[None, :])
        lse = tl.load(LSE2 + statistics + tile * R + r)
        delta = tl.load(DELTA + statistics + tile * R + r)
        score = tl.dot(key, tl.trans(q), input_precision=PRECISION) * log2_scale - lse[None, :]
        weight = tl.exp2(tl.where((word[:, None] & bit[None, :]) != 0, score, float("-inf")))
        dvalue = tl.dot(weight.to(dout.dtype), dout, dvalue, input_precision=PRECISION)
        dweight = tl.dot(value, tl.trans(dout), input_precision=PRECISION)
        dscore = (weight * (dweight - delta[None, :])).to(q.dtype)
        dkey = tl.dot(dscore, q, dkey, input_precision=PRECISION)
    to = ((batch * sk + j) * groups + kvh)[:, None] * D + d[None, :]
    tl.store(DK + to, (dkey * scale).to(DK.dtype.element_ty), mask=(j < sk)[:, None])
    tl.store(DV + to, dvalue.to(DV.dtype.element_ty), mask=(j < sk)[:, None])
