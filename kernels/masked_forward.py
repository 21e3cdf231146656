"""Sparse attention forward over a bit mask: dense tiles without the key blocks that nobody selected.

Owns the rows of a tile and the online softmax over its live blocks (FlashAttention's recurrence). All query
heads of a KV head are rows of one matrix: they share the mask, one word a key.
Axes: R rows of a tile (query T, head G), of which a program takes `ROWS`; n keys of a block, d head dim.
"""

import triton
import triton.language as tl

from megatron_clsa.kernels.union_forward import (
    LOWEST,
    infinity_bits,
    lift,
    only_members,
    softmax_step,
    store_rows,
)


@triton.jit
def part_rows(r, tile, kvh, sq, G: tl.constexpr, T: tl.constexpr):
    """Of rows `r` of a tile: what lifts its bit in the tile's words, query, head, whether it exists.

    Rows that do not exist get the last query's number, which they may read; what they give is dropped.
    """
    place = r // G
    up = lift(place)
    query = tile * T + place
    real = (place < T) & (query < sq)
    return up, tl.minimum(query, sq - 1).to(tl.int64), kvh * G + r % G, real


@triton.jit
def block_rows(base, start, stride, sk, n, d, WHOLE: tl.constexpr):
    """Pointers to rows `start + n` of keys or values; beyond the last key, where no bit is set, to the last.

    `WHOLE`: the keys fill their blocks, and all but `start` is computed once, before the loop.
    """
    if WHOLE:
        return base + start.to(tl.int64) * stride + ((n * stride)[:, None] + d[None, :])
    return base + (tl.minimum(start + n, sk - 1).to(tl.int64) * stride)[:, None] + d[None, :]


@triton.jit(do_not_specialize=["tiles", "sq", "sk"])
def masked_forward(
    Q, K, V, WORDS, OFFSETS, ENTRIES, ORDER, OUT, LSE, scale, tiles, sq, sk, width,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
    G: tl.constexpr, T: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """`scale` is positive: the largest product is the largest score."""
    tile = tl.load(ORDER + tl.program_id(0) // (R // ROWS))
    r = tl.program_id(0) % (R // ROWS) * ROWS + tl.arange(0, ROWS)
    kvh = tl.program_id(1)
    heads = tl.num_programs(1) * G
    batch = (tile // tiles).to(tl.int64)
    up, query, head, real = part_rows(r, tile % tiles, kvh, sq, G, T)
    d, n = tl.arange(0, D), tl.arange(0, KEYS)
    q = tl.load(Q + batch * q_b + (query * q_s + head * q_h)[:, None] + d[None, :])
    base_k, base_v = K + batch * k_b + kvh * k_h, V + batch * v_b + kvh * v_h
    words = WORDS + tile.to(tl.int64) * width
    infinity = infinity_bits(scale)
    highest = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    log2_scale = scale * 1.4426950408889634
    STEPS: tl.constexpr = BLOCK // KEYS
    first, last = tl.load(OFFSETS + tile), tl.load(OFFSETS + tile + 1)
    for i in tl.range(0, (last - first).to(tl.int32) * STEPS, num_stages=STAGES):
        start = tl.load(ENTRIES + first + i // STEPS) * BLOCK + i % STEPS * KEYS
        word = tl.load(words + start + n)
        key = tl.load(block_rows(base_k, start, k_s, sk, n, d, WHOLE))
        score = tl.dot(q, tl.trans(key), input_precision=PRECISION)
        score = only_members(score, word[None, :], up[:, None], infinity)
        weight, highest, total, shrink = softmax_step(score, highest, total, log2_scale)
        value = tl.load(block_rows(base_v, start, v_s, sk, n, d, WHOLE))
        acc = acc * shrink[:, None]
        acc = tl.dot(weight.to(value.dtype), value, acc, input_precision=PRECISION)
    store_rows(OUT, LSE, acc, highest, total, batch, query, head, heads, sq, real, D)
