"""Sparse attention backward over a union plan, without atomics.

Owns three kernels. `row_products` prepares; `union_backward` walks a tile's union once more (five products a
block), keeps dQ in registers and writes the tile's dK and dV rows in plan order; `sum_rows` adds each key's
rows in that order, in fp32: the same bits in every run. On Hopper `union_backward_hopper.py` walks instead.
Axes: b batch, h heads, R rows of a tile, n keys of a block, d head dim, p plan rows.
"""

import triton
import triton.language as tl

from megatron_clsa.kernels.union_forward import infinity_bits, lift, only_members, tile_rows


@triton.jit(do_not_specialize=["tile1", "row0", "tiles", "sq"])
def union_backward(
    Q, K, V, DOUT, KEYS, MEMBERS, OFFSETS, LSE, DELTA, DQ, ROWS, scale, tile1, row0, tiles, sq,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, do_b, do_s, do_h,
    G: tl.constexpr, T: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tile1 - 1 - tl.program_id(0)  # late queries see the most
    kvh = tl.program_id(1)
    groups = tl.num_programs(1)
    place, batch, query, head, real = tile_rows(tile, tiles, kvh, sq, G, T, R)
    d, n = tl.arange(0, D), tl.arange(0, BLOCK)
    query64 = query.to(tl.int64)
    at = batch * q_b + query64 * q_s + head * q_h
    q = tl.load(Q + at[:, None] + d[None, :], mask=real[:, None], other=0.0)
    at = batch * do_b + query64 * do_s + head * do_h
    dout = tl.load(DOUT + at[:, None] + d[None, :], mask=real[:, None], other=0.0)
    statistic = (batch * groups * G + head) * sq + query
    lse = tl.load(LSE + statistic, mask=real, other=0.0)
    lse = tl.where(lse == float("-inf"), 0.0, lse) * 1.4426950408889634
    delta = tl.load(DELTA + statistic, mask=real, other=0.0) * scale
    up = lift(place)
    base_k, base_v = K + batch * k_b + kvh * k_h, V + batch * v_b + kvh * v_h
    infinity = infinity_bits(scale)
    dq = tl.zeros([R, D], tl.float32)
    log2_scale = scale * 1.4426950408889634
    for p in tl.range(tl.load(OFFSETS + tile), tl.load(OFFSETS + tile + 1), BLOCK, num_stages=STAGES):
        j, word = tl.load(KEYS + p + n).to(tl.int64), tl.load(MEMBERS + p + n)
        key = tl.load(base_k + (j * k_s)[:, None] + d[None, :])
        value = tl.load(base_v + (j * v_s)[:, None] + d[None, :])
        score = tl.dot(q, tl.trans(key), input_precision=PRECISION) * log2_scale - lse[:, None]
        weight = tl.exp2(only_members(score, word[None, :], up[:, None], infinity))
        to = ROWS + ((p - row0 + n) * groups + kvh)[:, None] * (2 * D) + d[None, :]
        dvalue = tl.dot(tl.trans(weight.to(q.dtype)), dout, input_precision=PRECISION)
        tl.store(to + D, dvalue.to(ROWS.dtype.element_ty))
        dweight = tl.dot(dout, tl.trans(value), input_precision=PRECISION)
        dscore = (weight * (dweight * scale - delta[:, None])).to(q.dtype)
        dkey = tl.dot(tl.trans(dscore), q, input_precision=PRECISION)
        tl.store(to, dkey.to(ROWS.dtype.element_ty))
        dq = tl.dot(dscore, key, dq, input_precision=PRECISION)
    to = DQ + ((batch * sq + query) * groups * G + head)[:, None] * D + d[None, :]
    tl.store(to, dq.to(DQ.dtype.element_ty), mask=real[:, None])


@triton.jit(do_not_specialize=["sq", "h"])
def row_products(
    OUT, DOUT, DELTA, sq, h, o_b, o_s, o_h, do_b, do_s, do_h, D: tl.constexpr, BLOCK: tl.constexpr
):
    """`DELTA [b, h, sq] = sum_d OUT * DOUT` in fp32, what the softmax's gradient subtracts.

    Heads are on the grid's first axis: the second ends at 65535, which b * h may pass.
    """
    head, batch = tl.program_id(0) % h, (tl.program_id(0) // h).to(tl.int64)
    s = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d, s64, inside = tl.arange(0, D), s.to(tl.int64), (s < sq)[:, None]
    at = OUT + batch * o_b + head * o_h + (s64 * o_s)[:, None] + d[None, :]
    out = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    at = DOUT + batch * do_b + head * do_h + (s64 * do_s)[:, None] + d[None, :]
    dout = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(DELTA + (batch * h + head) * sq + s, tl.sum(out * dout, 1), mask=s < sq)


@triton.jit
def sum_rows(ROWS, KEY_OFFSETS, ENTRIES, SUM, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """`SUM [b * sk, parts, WIDTH] += ` the key's rows of `ROWS [p, parts, WIDTH]`, in its entries' order.

    The `FIRST` of several sums does not read what was there, and writes every key.
    """
    key, part = tl.program_id(0), tl.program_id(1)
    parts = tl.num_programs(1)
    first, last = tl.load(KEY_OFFSETS + key), tl.load(KEY_OFFSETS + key + 1)
    if FIRST or first < last:
        w, n = tl.arange(0, WIDTH), tl.arange(0, BLOCK)
        acc = tl.zeros([WIDTH], tl.float32)
        for e in tl.range(first, last, BLOCK):
            row = tl.load(ENTRIES + e + n, mask=e + n < last, other=0).to(tl.int64)
            at = ROWS + (row * parts + part)[:, None] * WIDTH + w[None, :]
            acc += tl.sum(tl.load(at, mask=(e + n < last)[:, None], other=0.0).to(tl.float32), 0)
        to = SUM + (key.to(tl.int64) * parts + part) * WIDTH + w
        if not FIRST:
            acc += tl.load(to)
        tl.store(to, acc)
