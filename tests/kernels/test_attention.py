"""Dense, sparse and windowed attention equal the N x N reference, forward and backward, on every kind of row.

Owns the plain-torch path; the Triton kernels repeat these claims in their own files.
"""

import pytest
import torch
from kernel_cases import (
    assert_as_exact_as_torch,
    make_case,
    packed_rows,
    random_index,
    take_rows,
    zigzag_positions,
)

from megatron_clsa.kernels import dispatch, reference
from megatron_clsa.kernels.blocks import BlockSizes
from megatron_clsa.kernels.rows import RowRange, causal_rows
from megatron_clsa.kernels.streaming_attention import streaming_attention

SIZES = [1, 63, 65, 300]


def out_and_grads(function, case):
    out, lse = function(case)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view_as(out)
    grads = torch.autograd.grad((out * weight).sum(), (case.query, case.key, case.value))
    return out, lse, *grads


def check(function, direct, case, dtype=torch.float32):
    actual = out_and_grads(function, case.to(dtype))
    same = out_and_grads(direct, case.to(dtype))
    exact = out_and_grads(direct, case.to(dtype).to(torch.float64))
    for a, s, e in zip(actual, same, exact, strict=True):
        seen = torch.isfinite(e)
        assert torch.equal(torch.isfinite(a).cpu(), seen.cpu())
        assert_as_exact_as_torch(a[seen], s[seen], e[seen])


def dense(case):
    return dispatch.dense_attention(case.query, case.key, case.value, case.rows, case.scale)


def direct(case, index=None):
    return reference.attention(case.query, case.key, case.value, case.rows, case.scale, index)


def sparse(index):
    return lambda case: dispatch.sparse_attention(
        case.query, case.key, case.value, index, case.rows, case.scale
    )


@pytest.mark.parametrize("seq", SIZES)
@pytest.mark.parametrize("heads", [(4, 4), (5, 1), (10, 2)])
def test_dense_equals_reference(seq, heads):
    check(dense, direct, make_case(b=2, sq=seq, h=heads[0], g=heads[1]))


def test_dense_equals_reference_on_one_thousand_rows():
    check(dense, direct, make_case(sq=1000, h=4, g=2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dense_in_other_precisions(dtype):
    check(dense, direct, make_case(sq=130), dtype)


@pytest.mark.parametrize("seq", SIZES)
@pytest.mark.parametrize("k", [1, 17, 400])
def test_sparse_equals_reference(seq, k):
    case = make_case(b=2, sq=seq, h=10, g=2)
    index = random_index(case.rows, seq, k)
    check(sparse(index), lambda c: direct(c, index), case)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_packed_documents_stay_apart(kind):
    rows = packed_rows(2, 200, [1, 37, 63])
    case = make_case(b=2, sq=200, rows=rows)
    index = random_index(rows, 200, 20) if kind == "sparse" else None
    check(dense if index is None else sparse(index), lambda c: direct(c, index), case)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_empty_rows_give_zero_and_no_nan(kind):
    rows = causal_rows(1, 70)
    end = rows.end.clone()
    end[:, 10:20] = -1
    start = rows.start.clone()
    start[:, 40:50] = 60
    rows = RowRange(start, end)
    case = make_case(sq=70, rows=rows)
    index = random_index(rows, 70, 9) if kind == "sparse" else None
    out, lse, *grads = out_and_grads(dense if index is None else sparse(index), case.to(torch.float32))
    assert out[:, 10:20].eq(0).all() and out[:, 40:50].eq(0).all()
    assert lse[:, :, 10:20].eq(float("-inf")).all()
    assert all(torch.isfinite(grad).all() for grad in grads)
    check(dense if index is None else sparse(index), lambda c: direct(c, index), case)


@pytest.mark.parametrize(
    "blocks", [BlockSizes(1, 1), BlockSizes(7, 5), BlockSizes(64, 16), BlockSizes(999, 999)]
)
def test_any_block_size_gives_the_same(blocks):
    case = make_case(sq=65, rows=packed_rows(1, 65, [20, 9]))
    index = random_index(case.rows, 65, 6)

    def blocked(c):
        return streaming_attention(c.query, c.key, c.value, c.rows, c.scale, index, blocks)

    check(blocked, lambda c: direct(c, index), case)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_context_parallel_rows_equal_the_whole(rank):
    whole = make_case(sq=128, h=4, g=2).to(torch.float32)
    positions = zigzag_positions(128, rank, 4)
    rows = take_rows(whole.rows, positions)
    full, full_lse = dense(whole)
    part, part_lse = dispatch.dense_attention(
        whole.query[:, positions], whole.key, whole.value, rows, whole.scale
    )
    torch.testing.assert_close(part, full[:, positions], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(part_lse, full_lse[:, :, positions], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_two_runs_are_bitwise_equal(kind):
    case = make_case(b=2, sq=300).to(torch.float32)
    function = dense if kind == "dense" else sparse(random_index(case.rows, 300, 33))
    for first, second in zip(out_and_grads(function, case), out_and_grads(function, case), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_point_17_a_row_decoded_over_a_cache_equals_prefill(kind):
    case = make_case(sq=70, h=4, g=2).to(torch.float32)
    index = random_index(case.rows, 70, 9) if kind == "sparse" else None
    whole, whole_lse = dense(case) if index is None else sparse(index)(case)
    for t in (0, 1, 33, 69):
        at, seen = slice(t, t + 1), slice(0, t + 1)
        rows = take_rows(case.rows, torch.tensor([t]))
        cached = case.query[:, at], case.key[:, seen], case.value[:, seen]
        if index is None:
            out, lse = dispatch.dense_attention(*cached, rows, case.scale)
        else:
            out, lse = dispatch.sparse_attention(*cached, index[:, at], rows, case.scale)
        torch.testing.assert_close(out, whole[:, at], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(lse, whole_lse[:, :, at], rtol=1e-6, atol=1e-6)


def test_future_keys_do_not_reach_a_row():
    case = make_case(sq=100).to(torch.float32)
    before = dense(case)[0]
    changed = case.key.detach().clone()
    changed[:, 60:] = 1e4
    after = dispatch.dense_attention(case.query, changed, case.value, case.rows, case.scale)[0]
    assert torch.equal(before[:, :60], after[:, :60])


def test_large_logits_do_not_overflow():
    case = make_case(sq=65)
    case.query, case.key = case.query * 30, case.key * 30
    check(dense, direct, case)


def windowed(window, rows):
    def run(case):
        out = dispatch.window_attention(case.query, case.key, case.value, rows, window, case.scale)
        return out, out.new_zeros(1)

    return run


def direct_window(rows):
    def run(case):
        out, _ = reference.attention(case.query, case.key, case.value, rows, case.scale)
        return out, out.new_zeros(1)

    return run


@pytest.mark.parametrize("window", [1, 16, 100, 512])
@pytest.mark.parametrize("seq", [1, 65, 300, 1000])
def test_window_equals_reference(seq, window):
    rows = packed_rows(2, seq, [150, 3, 40]).windowed(window)
    check(windowed(window, rows), direct_window(rows), make_case(b=2, sq=seq, rows=rows, d=16))


def test_window_over_keys_with_a_halo_in_front():
    positions = torch.arange(64, 128)
    rows = take_rows(causal_rows(1, 128).windowed(17), positions)
    rows = RowRange(rows.start - 48, rows.end - 48)  # the first key is that of position 48
    case = make_case(sq=64, sk=80, rows=rows)
    check(windowed(17, rows), direct_window(rows), case)


@pytest.mark.parametrize("rank", [0, 1])
def test_window_on_zigzag_rows(rank):
    rows = take_rows(packed_rows(1, 256, [90]).windowed(20), zigzag_positions(256, rank, 2))
    check(windowed(20, rows), direct_window(rows), make_case(sq=128, sk=256, rows=rows))


def test_window_on_rows_of_any_order():
    rows = take_rows(causal_rows(1, 64).windowed(9), torch.randperm(64))
    check(windowed(9, rows), direct_window(rows), make_case(sq=64, rows=rows))


def test_window_with_empty_rows():
    rows = causal_rows(1, 64).windowed(9)
    start = rows.start.clone()
    start[:, :12] = 12
    rows = RowRange(start, rows.end)
    check(windowed(9, rows), direct_window(rows), make_case(sq=64, rows=rows))
