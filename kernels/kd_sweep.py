"""Triton kernels of the distillation loss: index LSE, the sweep over all heads' scores, dk_idx.

Owns tiles and arithmetic; launches and scratch are in `kd_launch.py`, autograd in `indexer_kd.py`. A pair's
scores are made once for all heads, and their probabilities added in registers:

    index_lse       log2 of the sum of exp2(I) of a span; join_spans of all
    sweep           A = sum_h exp2(q_h . k - lse_h);  d = H softmax(I) - A -> scratch;  value of a span
    query_gradient  dq_idx of a span = d k_idx
    key_gradient    dk_idx of a key tile += d^T q_idx over the row tiles of the chunk, in their order

A program's work is one row tile x one span of keys, whatever the visible range, so that all programs are
alike. No atomics: every sum has one order. Scores are in log2 units. Axes: m rows of a tile, n keys of a
tile, h heads, g KV heads, d head dim, di index dim (D its power of two).
"""

import triton
import triton.language as tl


@triton.jit
def _visible(MASK, start, end, local, j, padded, SELECTED: tl.constexpr):
    """`[m, n]` bool; MASK `[chunk, padded]` holds the selected keys of the chunk's rows, one byte each."""
    seen = (j[None, :] >= start[:, None]) & (j[None, :] <= end[:, None])
    if SELECTED:
        chosen = tl.load(MASK + local.to(tl.int64)[:, None] * padded + j[None, :])
        seen = seen & (chosen != 0)
    return seen


@triton.jit
def _holds_any(FLAGS, tile, s, inside, padded, BN: tl.constexpr, SELECTED: tl.constexpr):
    """Whether the tile at key `s` holds a selected key; FLAGS `[row tiles, padded / BN]`."""
    flag = inside
    if SELECTED:
        flag = tl.load(FLAGS + tile * (padded // BN) + s // BN, mask=inside, other=0) != 0
    return flag


@triton.jit
def _parts(LOW, HIGH, tile, chunk, sk, BM: tl.constexpr, ROWS: tl.constexpr):
    """Of a tile of BM rows, its row tiles (of ROWS, as the sweep's), and each one's range of keys."""
    part = tile * (BM // ROWS) + tl.arange(0, BM // ROWS)
    inside = part * ROWS < chunk
    return part, tl.load(LOW + part, mask=inside, other=sk), tl.load(HIGH + part, mask=inside, other=0)


@triton.jit
def _rows(START, END, batch, row, inside, sq, sk):
    at = batch.to(tl.int64) * sq + row
    start = tl.load(START + at, mask=inside, other=0)
    end = tl.load(END + at, mask=inside, other=-1)
    return tl.maximum(start, 0), tl.minimum(end, sk - 1)


@triton.jit
def index_lse(
    QI, KI, START, END, LOW, HIGH, MASK, FLAGS, LSE, batch, row0, chunk, sq, sk, padded, scale,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr,
    SELECTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """log2 of the sum of exp2(I) over one span of keys: LSE `[spans, chunk]`, -inf where none is visible."""
    tile, span = tl.program_id(0), tl.program_id(1)
    batch = tl.cast(batch, tl.int32)
    local = tile * BM + tl.arange(0, BM)
    start, end = _rows(START, END, batch, row0 + local, local < chunk, sq, sk)
    part, lows, highs = _parts(LOW, HIGH, tile, chunk, sk, BM, ROWS)
    low, high = tl.maximum(tl.min(lows), span * SPAN), tl.minimum(tl.max(highs), (span + 1) * SPAN)
    q = QI.load([batch * sq + row0 + tile * BM, 0])
    most, total = tl.full([BM], -1e30, tl.float32), tl.zeros([BM], tl.float32)
    for s in tl.range(low // BN * BN, high, BN):
        if tl.max(_holds_any(FLAGS, part, s, part * ROWS < chunk, padded, BN, SELECTED).to(tl.int32)) != 0:
            j = s + tl.arange(0, BN)
            x = tl.dot(q, KI.load([batch * sk + s, 0]).T, input_precision=PRECISION) * scale
            x = tl.where(_visible(MASK, start, end, local, j, padded, SELECTED), x, -1e30)
            new = tl.maximum(most, tl.max(x, 1))
            weight = tl.where(x > -1e29, tl.exp2(x - new[:, None]), 0.0)
            total = total * tl.exp2(most - new) + tl.sum(weight, 1)
            most = new
    lse = tl.where(total > 0, most + tl.log2(total), float("-inf"))
    tl.store(LSE + tl.cast(span, tl.int64) * chunk + local, lse, mask=local < chunk)


@triton.jit
def join_spans(PARTS, OUT, chunk, spans, BLOCK: tl.constexpr):
    """OUT `[chunk]`: log2 of the sum of exp2 over PARTS `[spans, chunk]`, -inf where all are."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    most, total = tl.full([BLOCK], -1e30, tl.float32), tl.zeros([BLOCK], tl.float32)
    for span in range(spans):
        x = tl.load(PARTS + tl.cast(span, tl.int64) * chunk + at, mask=at < chunk, other=float("-inf"))
        new = tl.maximum(most, x)
        total = total * tl.exp2(most - new) + tl.exp2(x - new)
        most = new
    tl.store(OUT + at, tl.where(total > 0, most + tl.log2(total), float("-inf")), mask=at < chunk)


@triton.jit
def _attention_tile(
    Q, K, LSE, q_row, k_row, lse_row, inside, sq, scale,
    KV: tl.constexpr, G: tl.constexpr, HEAD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`[m, n]` sum of all heads' probabilities, not masked."""
    total = tl.zeros([BM, BN], tl.float32)
    for g in range(KV):
        k = K.load([k_row, g * HEAD])
        for i in tl.range(G, num_stages=STAGES):
            h = g * G + i
            lse = tl.load(LSE + lse_row + h.to(tl.int64) * sq, mask=inside, other=float("inf"))
            q = Q.load([q_row, h * HEAD])
            total += tl.exp2(tl.dot(q, k.T, input_precision=PRECISION) * scale - lse[:, None])
    return total


@triton.jit
def _finish_tile(
    total, q_idx, KI, k_row, s, MASK, SCRATCH, start, end, local, index_lse, padded, index_scale,
    HEADS: tl.constexpr, BN: tl.constexpr, SELECTED: tl.constexpr, GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Store d of the tile at key `s`; returns each row's sum of A I."""
    j = s + tl.arange(0, BN)
    k_idx = KI.load([k_row, 0])
    x = tl.dot(q_idx, k_idx.T, input_precision=PRECISION) * index_scale
    seen = _visible(MASK, start, end, local, j, padded, SELECTED)
    total = tl.where(seen, total, 0.0)
    x = tl.where(seen, x, 0.0)
    if GRADIENT:
        d = tl.where(seen, HEADS * tl.exp2(x - index_lse[:, None]), 0.0) - total
        tl.store(SCRATCH + local.to(tl.int64)[:, None] * padded + j[None, :], d.to(k_idx.dtype))
    return tl.sum(total * x, 1)


@triton.jit
def sweep(
    Q, K, LSE, QI, KI, INDEX_LSE, START, END, LOW, HIGH, MASK, FLAGS, SCRATCH, PRODUCT,
    batch, row0, chunk, sq, sk, padded, tiles, spans, scale, index_scale,
    KV: tl.constexpr, G: tl.constexpr, HEAD: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, SPAN: tl.constexpr, BAND: tl.constexpr, SELECTED: tl.constexpr,
    GRADIENT: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One row tile x one span: d to SCRATCH `[chunk, padded]`, the sum of A I to PRODUCT `[spans, chunk]`.

    Tiles without a selected key are passed over; their part of SCRATCH is left as it was, and not read.

    Programs go through BAND row tiles before the next span, so that those running together share keys
    and queries in the L2 cache.
    """
    pid = tl.program_id(0)
    band = pid // (BAND * spans)
    width = tl.minimum(tiles - band * BAND, BAND)
    tile = band * BAND + pid % (BAND * spans) % width
    span = pid % (BAND * spans) // width
    batch = tl.cast(batch, tl.int32)
    local = tile * BM + tl.arange(0, BM)
    inside = local < chunk
    start, end = _rows(START, END, batch, row0 + local, inside, sq, sk)
    low = tl.maximum(tl.load(LOW + tile), span * SPAN)
    high = tl.minimum(tl.load(HIGH + tile), (span + 1) * SPAN)
    q_row = batch * sq + row0 + tile * BM
    lse_row = batch.to(tl.int64) * (KV * G) * sq + row0 + local
    index_lse = tl.load(INDEX_LSE + local, mask=inside, other=float("inf"))
    product = tl.zeros([BM], tl.float32)
    for s in tl.range(low // BN * BN, high, BN, num_stages=1):
        if _holds_any(FLAGS, tile, s, True, padded, BN, SELECTED):
            k_row = batch * sk + s
            total = _attention_tile(
                Q, K, LSE, q_row, k_row, lse_row, inside, sq, scale, KV, G, HEAD, BM, BN, STAGES, PRECISION
            )
            q_idx = QI.load([q_row, 0])
            product += _finish_tile(
                total, q_idx, KI, k_row, s, MASK, SCRATCH, start, end, local, index_lse, padded, index_scale,
                KV * G, BN, SELECTED, GRADIENT, PRECISION,
            )  # fmt: skip
    tl.store(PRODUCT + tl.cast(span, tl.int64) * chunk + local, product, mask=inside)


@triton.jit
def query_gradient(
    SCRATCH, KI, LOW, HIGH, FLAGS, DQ, batch, chunk, sk, padded,
    DI: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPAN: tl.constexpr,
    ROWS: tl.constexpr, SELECTED: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """DQ `[spans, chunk, di]`: d k_idx over one span of keys."""
    tile, span = tl.program_id(0), tl.program_id(1)
    batch = tl.cast(batch, tl.int32)
    local = tile * BM + tl.arange(0, BM)
    _, lows, highs = _parts(LOW, HIGH, tile, chunk, sk, BM, ROWS)
    low, high = tl.maximum(tl.min(lows), span * SPAN), tl.minimum(tl.max(highs), (span + 1) * SPAN)
    part = local // ROWS
    row_low = tl.load(LOW + part, mask=local < chunk, other=sk) // BN * BN
    row_high = tl.load(HIGH + part, mask=local < chunk, other=0)
    dq = tl.zeros([BM, D], tl.float32)
    for s in tl.range(low // BN * BN, high, BN, num_stages=STAGES):
        source = SCRATCH + local.to(tl.int64)[:, None] * padded + s + tl.arange(0, BN)[None, :]
        if SELECTED or BM > ROWS:  # what the sweep passed over is not written
            made = (s >= row_low) & (s < row_high)
            made = _holds_any(FLAGS, part, s, made, padded, BN, SELECTED)
            d = tl.load(source, mask=tl.broadcast_to(made[:, None], (BM, BN)), other=0.0)
        else:
            d = tl.load(source)
        dq = tl.dot(d, KI.load([batch * sk + s, 0]), dq, input_precision=PRECISION)
    c = tl.arange(0, D)
    out = tl.cast(span, tl.int64) * chunk + local
    tl.store(DQ + out[:, None] * DI + c[None, :], dq, mask=(local < chunk)[:, None] & (c[None, :] < DI))


@triton.jit
def key_gradient(
    SCRATCH, QW, LOW, HIGH, FLAGS, DK, batch, row0, sq, sk, padded, tiles,
    DI: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
    SELECTED: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """DK `[sk, di]` fp32 of one key tile += d^T q over the row tiles that see it; q already weighted."""
    s = tl.program_id(0) * BN
    batch = tl.cast(batch, tl.int32)
    t = tl.arange(0, TILES)
    low = tl.load(LOW + t, mask=t < tiles, other=sk)
    high = tl.load(HIGH + t, mask=t < tiles, other=0)
    sees = (low // BN * BN < s + BN) & (high > s)
    first = tl.min(tl.where(sees, t, TILES))
    last = tl.max(tl.where(sees, t, -1))
    if first <= last:
        j = s + tl.arange(0, BN)
        c = tl.arange(0, D)
        at = DK + j.to(tl.int64)[:, None] * DI + c[None, :]
        keep = (j < sk)[:, None] & (c[None, :] < DI)
        dk = tl.load(at, mask=keep, other=0.0)
        for tile in tl.range(first, last + 1, num_stages=STAGES):
            seen = (tl.load(LOW + tile) // BN * BN < s + BN) & (tl.load(HIGH + tile) > s)
            seen = _holds_any(FLAGS, tile, s, seen, padded, BN, SELECTED)
            local = tile * BM + tl.arange(0, BM)
            source = SCRATCH + local.to(tl.int64)[:, None] * padded + j[None, :]
            d = tl.load(source, mask=tl.broadcast_to(seen, (BM, BN)), other=0.0)
            dk = tl.dot(d.T, QW.load([batch * sq + row0 + tile * BM, 0]), dk, input_precision=PRECISION)
        tl.store(at, dk, mask=keep)
