"""Triton kernels of the distillation over selected keys, tile by tile of a union plan.

Owns the arithmetic; launches and scratch are in `kd_union_launch.py`, autograd in `indexer_kd.py`. What
`kd_sweep.py` makes of all pairs is made here of those that a tile's queries can have selected: the keys of
its union, gathered. Keys are the rows of every product and queries its columns, head after head, each padded
to a power of two: the heads' probabilities of a pair then lie in one thread, and their sum moves nothing.

    union_index_lse   log2 of the sum of exp2(I) over a row's selected keys
    union_sweep       A = sum_h exp2(q_h . k - lse_h);  d = H softmax(I) - A;  value, dq_idx, rows of dk_idx

Rows of dk_idx are in plan order; `union_backward.sum_rows` adds each key's. No atomics: every sum has one
order. Scores are in log2 units. Axes: n keys of a block, c queries of a tile (padded to C), h heads, g KV
heads, d head dim, di index dim (D its power of two).
"""

import triton
import triton.language as tl


@triton.jit
def _tile_queries(tile, tiles, sq, c, T: tl.constexpr):
    """Of each column: its query's row of `[b * sq]`, and whether it exists; others get the last."""
    query = (tile % tiles) * T + c
    return (tile // tiles).to(tl.int64) * sq + tl.minimum(query, sq - 1), (c < T) & (query < sq)


@triton.jit
def _chosen_keys(KEYS, MEMBERS, p, stop, n):
    """Positions and members of a block of the union; past its end key 0, which nobody selected."""
    inside = p + n < stop
    j = tl.load(KEYS + p + n, mask=inside, other=0).to(tl.int64)
    return j, tl.load(MEMBERS + p + n, mask=inside, other=0)


@triton.jit
def _index_scores(
    KI, qi, first_key, j, word, c, scale, DI: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr
):
    """`k_idx [n, D]`, `I [n, c]`, and `[n, c]` whether the query selected the key."""
    e = tl.arange(0, D)
    at = KI + ((first_key + j) * DI)[:, None] + e[None, :]
    k_idx = tl.load(at) if DI == D else tl.load(at, mask=(e < DI)[None, :], other=0.0)
    x = tl.dot(k_idx, qi, input_precision=PRECISION) * scale
    return k_idx, x, ((word[:, None] >> tl.minimum(c, 31)[None, :]) & 1) != 0


@triton.jit
def _query_vectors(QI, at, real, DI: tl.constexpr, D: tl.constexpr):
    """`[D, c]`: columns of `[b * sq, di]`."""
    e = tl.arange(0, D)
    return tl.load(QI + at[None, :] * DI + e[:, None], mask=real[None, :] & (e < DI)[:, None], other=0.0)


@triton.jit(do_not_specialize=["tiles", "sq", "sk"])
def union_index_lse(
    QI, KI, KEYS, MEMBERS, OFFSETS, ORDER, LSE, scale, tiles, sq, sk,
    T: tl.constexpr, C: tl.constexpr, DI: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`LSE [b, sq]`; -inf for queries that selected nothing.

    The running sums are of each place of a block, not of each query: they meet once, after the last block.
    """
    tile = tl.load(ORDER + tl.program_id(0))
    c, n = tl.arange(0, C), tl.arange(0, BLOCK)
    at, real = _tile_queries(tile, tiles, sq, c, T)
    qi = _query_vectors(QI, at, real, DI, D)
    first_key = (tile // tiles).to(tl.int64) * sk
    most, total = tl.full([BLOCK, C], -1e30, tl.float32), tl.zeros([BLOCK, C], tl.float32)
    stop = tl.load(OFFSETS + tile + 1)
    for p in tl.range(tl.load(OFFSETS + tile), stop, BLOCK, num_stages=STAGES):
        j, word = _chosen_keys(KEYS, MEMBERS, p, stop, n)
        _, x, seen = _index_scores(KI, qi, first_key, j, word, c, scale, DI, D, PRECISION)
        x = tl.where(seen, x, float("-inf"))
        above = tl.maximum(most, x)
        total = total * tl.exp2(most - above) + tl.exp2(x - above)
        most = above
    highest = tl.max(most, 0)
    total = tl.sum(total * tl.exp2(most - highest[None, :]), 0)
    lse = tl.where(total > 0, highest + tl.log2(total), float("-inf"))
    tl.store(LSE + at, lse, mask=real)


@triton.jit
def _heads(
    key, Q, LSE, tile, tiles, sq, first, scale, q_b, q_s, q_h,
    H: tl.constexpr, N: tl.constexpr, T: tl.constexpr, C: tl.constexpr, HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`[n, c]`: probabilities of heads `first .. first + N`, added up; not masked."""
    column, d = tl.arange(0, N * C), tl.arange(0, HEAD)
    place, head = column % C, first + column // C
    batch = (tile // tiles).to(tl.int64)
    query = (tile % tiles) * T + place
    real = (place < T) & (query < sq)
    query = tl.minimum(query, sq - 1)
    at = Q + batch * q_b + query.to(tl.int64) * q_s + head * q_h
    q = tl.load(at[None, :] + d[:, None])
    lse = tl.load(LSE + (batch * H + head) * sq + query, mask=real, other=float("inf"))
    weight = tl.exp2(tl.dot(key, q, input_precision=PRECISION) * scale - lse[None, :])
    return tl.sum(tl.reshape(weight, [key.shape[0], N, C]), 1)


@triton.jit
def _all_heads(
    Q, K, LSE, j, tile, tiles, sq, scale, q_b, q_s, q_h, k_b, k_s, k_h,
    KV: tl.constexpr, G: tl.constexpr, T: tl.constexpr, C: tl.constexpr, HEAD: tl.constexpr,
    BLOCK: tl.constexpr, TOGETHER: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`A [n, c]`, not masked. A KV head's query heads go by TOGETHER, the rest by powers of two."""
    total = tl.zeros([BLOCK, C], tl.float32)
    d = tl.arange(0, HEAD)
    at = K + (tile // tiles).to(tl.int64) * k_b + (j * k_s)[:, None] + d[None, :]
    for g in tl.range(KV, num_stages=STAGES):
        key = tl.load(at + g * k_h)
        for i in tl.static_range(G // TOGETHER):
            first = g * G + i * TOGETHER
            total += _heads(
                key, Q, LSE, tile, tiles, sq, first, scale, q_b, q_s, q_h, KV * G, TOGETHER, T, C, HEAD,
                PRECISION,
            )  # fmt: skip
        for bit in tl.static_range(5):
            if G % TOGETHER & (1 << bit):
                first = g * G + G // TOGETHER * TOGETHER + G % TOGETHER % (1 << bit)
                total += _heads(
                    key, Q, LSE, tile, tiles, sq, first, scale, q_b, q_s, q_h, KV * G, 1 << bit, T, C, HEAD,
                    PRECISION,
                )  # fmt: skip
    return total


@triton.jit(do_not_specialize=["tile1", "row0", "tiles", "sq", "sk"])
def union_sweep(
    Q, K, LSE, QI, WEIGHTED, KI, INDEX_LSE, KEYS, MEMBERS, OFFSETS, PRODUCT, DQ, ROWS,
    scale, index_scale, tile1, row0, tiles, sq, sk, q_b, q_s, q_h, k_b, k_s, k_h,
    KV: tl.constexpr, G: tl.constexpr, T: tl.constexpr, C: tl.constexpr, HEAD: tl.constexpr,
    DI: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, TOGETHER: tl.constexpr, STAGES: tl.constexpr,
    WANT_DQ: tl.constexpr, WANT_DK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile: sums of A I to `PRODUCT [b, sq]`, `DQ [b, sq, di]`, rows of dk_idx to `ROWS [p - row0, D]`.

    `WEIGHTED [b, sq, di]` is q_idx times the rows' weights and the index scale, which `DQ` lacks.
    """
    tile = tile1 - 1 - tl.program_id(0)  # late queries see the most
    c, n, e = tl.arange(0, C), tl.arange(0, BLOCK), tl.arange(0, D)
    at, real = _tile_queries(tile, tiles, sq, c, T)
    qi = _query_vectors(QI, at, real, DI, D)
    index_lse = tl.load(INDEX_LSE + at)
    if WANT_DK:
        weighted = tl.load(
            WEIGHTED + at[:, None] * DI + e[None, :], mask=real[:, None] & (e < DI)[None, :], other=0.0
        )
    first_key = (tile // tiles).to(tl.int64) * sk
    product, dq = tl.zeros([BLOCK, C], tl.float32), tl.zeros([C, D], tl.float32)
    stop = tl.load(OFFSETS + tile + 1)
    for p in tl.range(tl.load(OFFSETS + tile), stop, BLOCK, num_stages=1):
        j, word = _chosen_keys(KEYS, MEMBERS, p, stop, n)
        total = _all_heads(
            Q, K, LSE, j, tile, tiles, sq, scale, q_b, q_s, q_h, k_b, k_s, k_h,
            KV, G, T, C, HEAD, BLOCK, TOGETHER, STAGES, PRECISION,
        )  # fmt: skip
        k_idx, x, seen = _index_scores(KI, qi, first_key, j, word, c, index_scale, DI, D, PRECISION)
        total = tl.where(seen, total, 0.0)
        x = tl.where(seen, x, 0.0)
        product += total * x
        if WANT_DQ or WANT_DK:
            d = tl.where(seen, KV * G * tl.exp2(x - index_lse[None, :]), 0.0) - total
            d = d.to(k_idx.dtype)
        if WANT_DQ:
            dq = tl.dot(tl.trans(d), k_idx, dq, input_precision=PRECISION)
        if WANT_DK:
            row = tl.dot(d, weighted, input_precision=PRECISION)
            to = ROWS + (p - row0 + n)[:, None] * D + e[None, :]
            tl.store(to, row.to(ROWS.dtype.element_ty), mask=(p + n < stop)[:, None])
    tl.store(PRODUCT + at, tl.sum(product, 0), mask=real)
    if WANT_DQ:
        tl.store(DQ + at[:, None] * DI + e[None, :], dq, mask=real[:, None] & (e < DI)[None, :])
