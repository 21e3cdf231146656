"""Sparse attention forward over a union plan: one program reads one tile's union for one KV head.

Owns the online softmax of a tile (FlashAttention's recurrence over blocks of gathered keys). All query heads
of a KV head are rows of one matrix, so that a gathered key serves T x G rows.
Axes: R rows of a tile (query T, head G), n keys of a block, d head dim.
"""

import triton
import triton.language as tl

# Running maxima begin here: below every score, finite, so that -inf minus it is -inf and never NaN.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def lift(place):
    """What moves bit `place` of a word to the highest, as a factor: shifts would queue with comparisons."""
    return (tl.full(place.shape, 0x80000000, tl.uint32) >> tl.minimum(place, 31).to(tl.uint32)).to(tl.int32)


@triton.jit
def infinity_bits(scale):
    """The bits of +inf, unknown to the compiler; `scale` is positive."""
    return tl.where(scale > 0, 0x7F800000, 0)


@triton.jit
def only_members(score, word, up, infinity):
    """`score`, or -inf where the bit of `word` that `up` lifts is clear. All three broadcast.

    The bit moves to where a float has its sign: the smaller of score and +-inf needs no predicate, of which
    a thread has seven for its 32 scores. `infinity` (`infinity_bits`) is in a register, which makes the two
    logical operations one instruction. Measured kernel by kernel: some are faster with a plain select.
    """
    bound = (~(word * up) & -0x80000000) | infinity
    return tl.minimum(score, bound.to(tl.float32, bitcast=True))


@triton.jit
def tile_rows(tile, tiles, kvh, sq, G: tl.constexpr, T: tl.constexpr, R: tl.constexpr):
    """Of each row: its query's place in the tile, batch, position and head, and whether it exists."""
    r = tl.arange(0, R)
    place = r // G
    batch = (tile // tiles).to(tl.int64)
    query = (tile % tiles) * T + place
    return place, batch, query, kvh * G + r % G, (place < T) & (query < sq)


@triton.jit
def softmax_step(score, highest, total, log2_scale):
    """One step of the online softmax: weights, and the new maximum, sum, and factor of what was summed."""
    above = tl.maximum(highest, tl.max(score, 1) * log2_scale)
    weight = tl.exp2(score * log2_scale - above[:, None])
    shrink = tl.exp2(highest - above)
    return weight, above, total * shrink + tl.sum(weight, 1), shrink


@triton.jit
def store_rows(OUT, LSE, acc, highest, total, batch, query, head, heads, sq, real, D: tl.constexpr):
    """Write `acc [R, D]` over its sum, and the LSE; rows without keys give 0 and -inf, those with NaN NaN."""
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    to = OUT + ((batch * sq + query) * heads + head)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(to, out.to(OUT.dtype.element_ty), mask=real[:, None])
    lse = tl.where(total == 0, float("-inf"), (highest + tl.log2(total)) * 0.6931471805599453)
    tl.store(LSE + (batch * heads + head) * sq + query, lse, mask=real)


@triton.jit(do_not_specialize=["tiles", "sq"])
def union_forward(
    Q, K, V, KEYS, MEMBERS, OFFSETS, ORDER, OUT, LSE, scale, tiles, sq,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
    G: tl.constexpr, T: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`scale` is positive: the largest product is the largest score."""
    tile = tl.load(ORDER + tl.program_id(0))
    kvh = tl.program_id(1)
    heads = tl.num_programs(1) * G
    place, batch, query, head, real = tile_rows(tile, tiles, kvh, sq, G, T, R)
    d, n = tl.arange(0, D), tl.arange(0, BLOCK)
    at = batch * q_b + query.to(tl.int64) * q_s + head * q_h
    q = tl.load(Q + at[:, None] + d[None, :], mask=real[:, None], other=0.0)
    base_k, base_v = K + batch * k_b + kvh * k_h, V + batch * v_b + kvh * v_h
    bit = tl.full([R], 1, tl.int32) << tl.minimum(place, 31)
    highest = tl.full([R], LOWEST, tl.float32)
    total = tl.zeros([R], tl.float32)
    acc = tl.zeros([R, D], tl.float32)
    log2_scale = scale * 1.4426950408889634
    for p in tl.range(tl.load(OFFSETS + tile), tl.load(OFFSETS + tile + 1), BLOCK, num_stages=STAGES):
        j, word = tl.load(KEYS + p + n).to(tl.int64), tl.load(MEMBERS + p + n)
        key = tl.load(base_k + (j * k_s)[:, None] + d[None, :])
        score = tl.dot(q, tl.trans(key), input_precision=PRECISION)
        score = tl.where((word[None, :] & bit[:, None]) != 0, score, float("-inf"))
        weight, highest, total, shrink = softmax_step(score, highest, total, log2_scale)
        value = tl.load(base_v + (j * v_s)[:, None] + d[None, :])
        acc = acc * shrink[:, None]
        acc = tl.dot(weight.to(value.dtype), value, acc, input_precision=PRECISION)
    store_rows(OUT, LSE, acc, highest, total, batch, query, head, heads, sq, real, D)
