"""The index is exact: fp32 order, ties to the smaller position, ascending, -1 fills, own document only.

Owns the plain-torch path; the Triton kernel is held to the same cases in its own file.
"""

import pytest
import torch
from kernel_cases import make_case, packed_rows, take_rows, zigzag_positions

from megatron_clsa.kernels import dispatch, reference
from megatron_clsa.kernels.rows import RowRange, causal_rows
from megatron_clsa.kernels.streaming_topk import streaming_topk


def integer_vectors(*shape, seed=0, span=3):
    """Small integers: scores are exact in any order of summation and tie often."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-span, span + 1, shape, generator=generator).float()


def check(q_idx, k_idx, rows, k):
    actual = dispatch.topk_index(q_idx, k_idx, rows, k)
    assert actual.dtype == torch.int32
    assert torch.equal(actual, reference.topk_index(q_idx, k_idx, rows, k))
    return actual


@pytest.mark.parametrize("seq", [1, 63, 65, 300, 1000])
@pytest.mark.parametrize("k", [1, 16, 100, 2048])
def test_ties_go_to_the_smaller_position(seq, k):
    check(integer_vectors(2, seq, 4), integer_vectors(2, seq, 4, seed=1), causal_rows(2, seq), k)


@pytest.mark.parametrize("span", [0, 1])
def test_equal_rows_keep_the_first_positions(span):
    """All scores zero (also as -0): the k smallest positions win."""
    q_idx = -integer_vectors(1, 80, 2, span=span).abs()
    index = check(q_idx, torch.zeros(1, 80, 2), causal_rows(1, 80), 7)
    assert torch.equal(index[0, 79], torch.arange(7, dtype=torch.int32))


def test_packed_documents_and_short_ones():
    rows = packed_rows(2, 200, [5, 60, 1])
    index = check(integer_vectors(2, 200, 4), integer_vectors(2, 200, 4, seed=1), rows, 16)
    assert ((index == -1) | (index >= rows.start[..., None])).all()


def test_empty_rows_select_nothing():
    rows = causal_rows(1, 40)
    rows = RowRange(rows.start, torch.where(rows.end < 9, -1, rows.end))
    index = check(integer_vectors(1, 40, 4), integer_vectors(1, 40, 4, seed=1), rows, 8)
    assert index[:, :9].eq(-1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_nan_and_minus_infinity_come_last(bad):
    q_idx, k_idx = torch.ones(1, 50, 1), integer_vectors(1, 50, 1)
    k_idx[:, ::3] = bad
    check(q_idx, k_idx, causal_rows(1, 50), 10)
    check(q_idx, k_idx, causal_rows(1, 50), 40)


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_index_is_identical_on_every_cp_rank(rank):
    case, positions = make_case(sq=128), zigzag_positions(128, rank, 4)
    whole = dispatch.topk_index(case.q_idx, case.k_idx, case.rows, 16)
    rows = take_rows(case.rows, positions)
    assert torch.equal(
        whole[:, positions], dispatch.topk_index(case.q_idx[:, positions], case.k_idx, rows, 16)
    )


@pytest.mark.parametrize("block_rows", [1, 7, 64, 1000])
def test_any_block_size_gives_the_same(block_rows):
    q_idx, k_idx, rows = (
        integer_vectors(1, 130, 4),
        integer_vectors(1, 130, 4, seed=1),
        packed_rows(1, 130, [50]),
    )
    assert torch.equal(
        streaming_topk(q_idx, k_idx, rows, 9, block_rows), reference.topk_index(q_idx, k_idx, rows, 9)
    )


def test_half_precision_inputs_are_scored_in_fp32():
    case = make_case(sq=200, d_idx=64)
    q_idx, k_idx = case.q_idx.bfloat16(), case.k_idx.bfloat16()
    expected = reference.topk_index(q_idx.double(), k_idx.double(), case.rows, 30)
    assert (dispatch.topk_index(q_idx, k_idx, case.rows, 30) == expected).float().mean() > 0.999
