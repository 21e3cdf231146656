"""The distillation loss and its gradient equal the N x N reference; nothing flows into the attention.

Owns the plain-torch path, and the sampled attention mass.
"""

import pytest
import torch
from kernel_cases import assert_as_exact_as_torch, make_case, packed_rows, random_index

from megatron_clsa.kernels import dispatch, reference
from megatron_clsa.kernels.blocks import BlockSizes
from megatron_clsa.kernels.rows import RowRange, causal_rows
from megatron_clsa.kernels.streaming_kd import streaming_kd


def attention_lse(case, index):
    if index is None:
        return dispatch.dense_attention(case.query, case.key, case.value, case.rows, case.scale)[1]
    return dispatch.sparse_attention(case.query, case.key, case.value, index, case.rows, case.scale)[1]


def kernel(case, index, function=dispatch.attention_kd, **kwargs):
    lse = attention_lse(case, index)
    arguments = case.query, case.key, lse, case.q_idx, case.k_idx, case.rows, index
    return function(*arguments, case.scale, case.index_scale, **kwargs)


def direct(case, index):
    arguments = case.query, case.key, case.q_idx, case.k_idx, case.rows, index
    return reference.attention_kd(*arguments, case.scale, case.index_scale)


def loss_and_grads(ce, case):
    weight = torch.linspace(0.5, 2, ce.numel(), dtype=ce.dtype, device=ce.device).view_as(ce)
    return ce, *torch.autograd.grad((ce * weight).sum(), (case.q_idx, case.k_idx))


def check(case, index, function=kernel, dtype=torch.float32):
    runs = []
    for compute, precision in ((function, dtype), (direct, dtype), (direct, torch.float64)):
        inputs = case.to(dtype).to(precision)
        runs.append(loss_and_grads(compute(inputs, index), inputs))
    for actual, same, exact in zip(*runs, strict=True):
        assert_as_exact_as_torch(actual, same, exact)


@pytest.mark.parametrize("seq", [1, 63, 65, 300, 1000])
@pytest.mark.parametrize("mode", ["full", "selected"])
def test_kd_equals_reference(seq, mode):
    case = make_case(b=2, sq=seq, h=5, g=1, rows=packed_rows(2, seq, [200, 31]))
    check(case, random_index(case.rows, seq, 24) if mode == "selected" else None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_kd_in_other_precisions(dtype):
    check(make_case(sq=90), None, dtype=dtype)


@pytest.mark.parametrize("mode", ["full", "selected"])
@pytest.mark.parametrize("blocks", [BlockSizes(1, 3), BlockSizes(16, 8)])
def test_any_block_size_gives_the_same(mode, blocks):
    case = make_case(sq=40)
    index = random_index(case.rows, 40, 6) if mode == "selected" else None
    check(case, index, lambda c, i: kernel(c, i, streaming_kd, blocks=blocks))


def test_gradient_flows_to_the_indexer_only():
    case = make_case(sq=30).to(torch.float32)
    grads = torch.autograd.grad(
        kernel(case, None).sum(), (case.query, case.key, case.q_idx, case.k_idx), allow_unused=True
    )
    assert grads[0] is None and grads[1] is None
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in grads[2:])


@pytest.mark.parametrize("mode", ["full", "selected"])
def test_score_gradient_rows_sum_to_zero(mode):
    """With one constant feature, d loss / d q_idx is the sum of the row's score gradients: zero."""
    case = make_case(sq=50, d_idx=3)
    case.k_idx[..., 0] = 1.0
    case = case.to(torch.float64)
    index = random_index(case.rows, 50, 8) if mode == "selected" else None
    grad = torch.autograd.grad(kernel(case, index).sum(), case.q_idx)[0]
    assert grad[..., 0].abs().max() < 1e-12


def test_empty_rows_cost_nothing():
    rows = causal_rows(1, 40)
    rows = RowRange(rows.start, torch.where(rows.end < 9, -1, rows.end))
    case = make_case(sq=40, rows=rows).to(torch.float32)
    ce, dq, dk = loss_and_grads(kernel(case, None), case)
    assert ce[:, :9].eq(0).all() and dq[:, :9].eq(0).all() and torch.isfinite(dk).all()


def test_kd_shards_of_heads_add_up():
    case = make_case(sq=60, h=4, g=2).to(torch.float64)
    lse = attention_lse(case, None)
    whole = kernel(case, None)
    parts = [
        dispatch.attention_kd(
            case.query[:, :, 2 * i : 2 * i + 2], case.key[:, :, i : i + 1], lse[:, 2 * i : 2 * i + 2],
            case.q_idx, case.k_idx, case.rows, None, case.scale, case.index_scale,
        )
        for i in range(2)
    ]  # fmt: skip
    torch.testing.assert_close(parts[0] + parts[1], whole)
