"""The Triton distillation loss and its gradients equal the float64 reference: odd shapes, documents, shards.

Owns the kernels of `indexer_kd.py`, in Triton's interpreter without a GPU and compiled with one.
"""

import pytest
import torch
from kernel_cases import make_case, packed_rows, random_index, take_rows, zigzag_positions

from megatron_clsa.kernels import dispatch, indexer_kd, kd_launch, kd_union_launch, reference
from megatron_clsa.kernels import plan as plan_module
from megatron_clsa.kernels.indexer_kd import triton_kd, triton_kd_sum
from megatron_clsa.kernels.kd_launch import Tiles
from megatron_clsa.kernels.kd_selected import mark_selected
from megatron_clsa.kernels.plan import build_union_plan, queries_of_tile
from megatron_clsa.kernels.rows import RowRange, causal_rows
from megatron_clsa.kernels.streaming_attention import streaming_attention
from megatron_clsa.kernels.streaming_kd import streaming_kd

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Gradients multiply d, rounded to the inputs' type, as attention kernels round their probabilities.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles, spans and chunks in a small problem; compiled tests keep the real sizes."""
    if DEVICE == "cpu":
        tiles = Tiles(rows=32, keys=16, span=32, gradient_span=64, band=2, stages=1)
        monkeypatch.setattr(indexer_kd, "default_tiles", lambda *tensors: tiles)
        monkeypatch.setattr(kd_launch, "SCRATCH_BYTES", 2 * 96 * 64)
        launch = kd_union_launch.Launch(keys=32, columns=64, stages=1)
        monkeypatch.setattr(kd_union_launch, "default_launch", lambda query: launch)


def drawn(dtype=torch.float32, index_size=None, **shape):
    """A case rounded to `dtype`, its index and its float64 attention LSE."""
    case = make_case(device=DEVICE, **shape).to(dtype)
    index = random_index(case.rows, case.key.shape[1], index_size) if index_size else None
    return case, index, float64_lse(case, index)


def float64_lse(case, index):
    exact = case.to(torch.float64)
    with torch.no_grad():
        attention = exact.query, exact.key, exact.value, exact.rows, exact.scale
        return streaming_attention(*attention, index)[1].float()


def row_weight(case):
    b, sq = case.rows.end.shape
    return torch.linspace(0.5, 2, b * sq, device=DEVICE).view(b, sq)


def union_plan(case, index):
    """As the model builds it."""
    group = case.query.shape[2] // case.key.shape[2]
    return build_union_plan(index, case.rows, case.key.shape[1], queries_of_tile(group, 64))


def by_rows(case, index, lse, weight, plan=None):
    """The weighted sum and its gradients to q_idx and k_idx."""
    arguments = case.query, case.key, lse, case.q_idx, case.k_idx, case.rows, index
    total = (triton_kd(*arguments, case.scale, case.index_scale, plan) * weight).sum()
    return total, *torch.autograd.grad(total, (case.q_idx, case.k_idx))


def by_sum(case, index, lse, weight, plan=None):
    arguments = case.query, case.key, lse, case.q_idx, case.k_idx, case.rows, index, weight
    total = triton_kd_sum(*arguments, case.scale, case.index_scale, plan)
    return total, *torch.autograd.grad(total, (case.q_idx, case.k_idx))


def exact(case, index, weight):
    case = case.to(torch.float64)
    arguments = case.query, case.key, case.q_idx, case.k_idx, case.rows, index
    total = (reference.attention_kd(*arguments, case.scale, case.index_scale) * weight).sum()
    return total, *torch.autograd.grad(total, (case.q_idx, case.k_idx))


def assert_close(actual, expected, tolerance):
    for a, e in zip(actual, expected, strict=True):
        assert torch.isfinite(a).all()
        error, size = (a.double() - e).abs().max().item(), e.abs().max().item()
        assert error <= tolerance * max(size, 1e-3), f"error {error:.3g} of {size:.3g}"


def check(dtype=torch.float32, **shape):
    case, index, lse = drawn(dtype, **shape)
    weight = row_weight(case)
    expected = exact(case, index, weight)
    for plan in [None] if index is None else [None, union_plan(case, index)]:
        assert_close(by_sum(case, index, lse, weight, plan), expected, TOLERANCE[dtype])
        assert_close(by_rows(case, index, lse, weight, plan), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("seq", [1, 63, 65, 98])
@pytest.mark.parametrize("index_size", [None, 24])
def test_any_length(seq, index_size):
    check(b=2, sq=seq, h=5, g=1, rows=packed_rows(2, seq, [51, 31], DEVICE), index_size=index_size)


@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (5, 1), (7, 1), (8, 1), (6, 2), (16, 1), (32, 1)])
@pytest.mark.parametrize("index_size", [None, 12])
def test_any_group_size(heads, index_size):
    check(sq=40 if heads[0] < 32 else 18, h=heads[0], g=heads[1], index_size=index_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d,d_idx", [(64, 32), (128, 48), (256, 256)])
@pytest.mark.parametrize("index_size", [None, 20])
def test_head_dims_and_half_precision(dtype, d, d_idx, index_size):
    check(dtype, sq=70, h=2, g=1, d=d, d_idx=d_idx, index_size=index_size)


def test_any_tiling_gives_the_same(monkeypatch):
    tiles = Tiles(rows=32, keys=16, span=16, gradient_span=16, band=1, stages=1)
    monkeypatch.setattr(indexer_kd, "default_tiles", lambda *tensors: tiles)
    check(sq=70, h=4, g=2)


def test_tiles_without_a_selected_key_are_passed_over():
    """Scratch is NaN until written: what nobody selects is neither written nor read."""
    case = make_case(b=2, sq=130, h=2, g=1, rows=packed_rows(2, 130, [90, 40], DEVICE), device=DEVICE)
    case = case.to(torch.float32)
    start, end = case.rows.start, case.rows.end
    index = torch.where(end % 50 < 25, start, (end - 4).clamp(min=start))[..., None] + torch.tensor(
        [0, 2, 4], dtype=torch.int32, device=DEVICE
    )
    index = torch.where(index > end[..., None], -1, index)
    lse = float64_lse(case, index)
    expected = exact(case, index, row_weight(case))
    assert_close(by_sum(case, index, lse, row_weight(case)), expected, 2e-5)


def test_marks_name_the_selected_keys_and_their_tiles():
    rows = packed_rows(1, 90, [37, 20], DEVICE)
    index = random_index(rows, 90, 5)
    index[0, 30:70] = -1
    marks = mark_selected(index[0], 96, 96, 32, 16)
    chosen = torch.zeros(96, 96, dtype=torch.bool, device=DEVICE)
    chosen[:90, :90] = reference.selection_mask(index, rows, 90)[0]
    tiles = chosen.view(3, 32, 6, 16).any(3).any(1)
    assert torch.equal(marks.mask.bool(), chosen) and torch.equal(marks.flags.bool(), tiles)


@pytest.mark.parametrize("mode", ["full", "selected", "union"])
@pytest.mark.parametrize("rank", [0, 3])
def test_context_parallel_shards_add_up_to_the_whole(rank, mode):
    """A shard's rows have the whole's values; its dk_idx is the part of its rows."""
    case, index, lse = drawn(sq=128, index_size=None if mode == "full" else 9)
    at = zigzag_positions(128, rank, 4).to(DEVICE)
    weight = torch.zeros(1, 128, device=DEVICE)
    weight[:, at] = 1.0
    whole = by_sum(case, index, lse, weight, union_plan(case, index) if mode == "union" else None)
    local = make_case(sq=128, device=DEVICE).to(torch.float32)
    local.query, local.q_idx = case.query[:, at], case.q_idx[:, at]
    local.key, local.k_idx, local.rows = case.key, case.k_idx, take_rows(case.rows, at)
    index = None if index is None else index[:, at]
    plan = union_plan(local, index) if mode == "union" else None
    part = by_sum(local, index, lse[:, :, at], weight[:, at], plan)
    assert_close(part, (whole[0], whole[1][:, at], whole[2]), 1e-5)


@pytest.mark.parametrize("mode", ["full", "selected", "union"])
def test_score_gradient_rows_sum_to_zero(mode):
    """With one constant feature, d loss / d q_idx is the sum of the row's score gradients: zero."""
    case, index, lse = drawn(sq=70, d_idx=16, index_size=None if mode == "full" else 8)
    with torch.no_grad():
        case.k_idx[..., 0] = 1.0
    plan = union_plan(case, index) if mode == "union" else None
    dq = by_sum(case, index, lse, row_weight(case), plan)[1]
    assert dq[..., 0].abs().max() < 2e-5


def test_no_row_depends_on_the_future():
    """Changing a key leaves the value and gradient of every earlier row as they were, to the bit."""
    case, _, lse = drawn(torch.bfloat16, sq=100)
    weight = torch.ones(1, 100, device=DEVICE)
    before = indexer_kd.run_sweep(*sweep_arguments(case, lse, weight))
    with torch.no_grad():
        case.key[:, 70], case.k_idx[:, 70] = 9.0, 9.0
    after = indexer_kd.run_sweep(*sweep_arguments(case, lse, weight))
    assert torch.equal(before[0][:, :70], after[0][:, :70])
    assert torch.equal(before[1][:, :70], after[1][:, :70])
    assert not torch.equal(before[0], after[0])


def sweep_arguments(case, lse, weight):
    tensors = [x.detach() for x in (case.query, case.key, lse, case.q_idx, case.k_idx)]
    return *tensors, case.rows, None, weight, case.scale, case.index_scale, True


@pytest.mark.parametrize("mode", ["full", "selected", "union"])
def test_two_runs_are_bitwise_equal(mode):
    case, index, lse = drawn(torch.bfloat16, b=2, sq=100, index_size=None if mode == "full" else 9)
    plan = union_plan(case, index) if mode == "union" else None
    first, second = (by_sum(case, index, lse, row_weight(case), plan) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_empty_rows_cost_nothing():
    """The first rows see nothing (LSE -inf); the last key is seen by none and gets exactly zero."""
    rows = causal_rows(1, 70, DEVICE)
    rows = RowRange(rows.start, torch.where(rows.end < 40, -1, rows.end.clamp(max=68)))
    case, _, lse = drawn(sq=70, rows=rows)
    assert lse[:, :, :40].eq(float("-inf")).all()
    total, dq, dk = by_sum(case, None, lse, row_weight(case))
    assert torch.isfinite(total) and dq[:, :40].eq(0).all() and dk[:, 69].eq(0).all()
    assert_close((total, dq, dk), exact(case, None, row_weight(case)), 2e-5)


def test_keys_outside_the_union_are_not_read():
    """NaN in keys that nobody selected reaches nothing; their gradient is zero, as that of empty rows."""
    case, index, _ = drawn(b=2, sq=70, index_size=5, rows=packed_rows(2, 70, [40, 13], DEVICE))
    index[0, 20:30] = -1
    lse, weight = float64_lse(case, index), row_weight(case)
    expected = exact(case, index, weight)
    chosen = reference.selection_mask(index, case.rows, 70).any(1)
    chosen[:, 0] = True  # what pads a union reads key 0, and drops it
    with torch.no_grad():
        case.key.masked_fill_(~chosen[..., None, None], float("nan"))
        case.k_idx.masked_fill_(~chosen[..., None], float("nan"))
    total, dq, dk = by_sum(case, index, lse, weight, union_plan(case, index))
    assert_close((total, dq, dk), expected, 2e-5)
    assert dk[~chosen].eq(0).all() and dq[0, 20:30].eq(0).all()


@pytest.mark.parametrize("index_size", [None, 9])
def test_scores_of_nan_are_not_taken_for_an_empty_row(index_size):
    case, index, lse = drawn(sq=40, index_size=index_size)
    with torch.no_grad():
        case.q_idx[0, 10] = float("nan")
    arguments = case.query, case.key, lse, case.q_idx, case.k_idx, case.rows, index
    for plan in [None] if index is None else [None, union_plan(case, index)]:
        with torch.no_grad():
            rows = triton_kd(*arguments, case.scale, case.index_scale, plan)
        assert rows.isnan().nonzero().tolist() == [[0, 10]]


def test_large_rows_of_key_gradients_fit_fp16():
    """A tile's sum over its queries passes 65504 before the index scale is on it; the gradient does not."""
    case = make_case(sq=40, h=20, g=4, d=16, d_idx=16, device=DEVICE).to(torch.float16)
    with torch.no_grad():
        case.q_idx.fill_(280.0), case.k_idx.zero_(), case.query.fill_(1.0), case.key.fill_(-2.0)
        case.k_idx[:, 0], case.key[:, 1] = 0.25, 2.0
    index = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE).repeat(1, 40, 1)
    index[0, 0, 1] = -1
    weight, lse = torch.ones(1, 40, device=DEVICE), float64_lse(case, index)
    plan = build_union_plan(index, case.rows, 40, 12)
    dk = by_sum(case, index, lse, weight, plan)[2]
    assert_close((dk,), exact(case, index, weight)[2:], 3e-3)


@pytest.mark.parametrize("mode", ["selected", "union"])
def test_gradients_are_contiguous_whatever_the_index_dim(mode):
    """As the fake tensors say, on which a compiled graph relies."""
    case, index, lse = drawn(sq=33, d_idx=48, index_size=8)
    tensors = [x.detach() for x in (case.query, case.key, lse, case.q_idx, case.k_idx)]
    plan = union_plan(case, index) if mode == "union" else None
    scales = case.scale, case.index_scale
    results = indexer_kd.run_sweep(*tensors, case.rows, index, row_weight(case), *scales, True, plan=plan)
    assert all(x.is_contiguous() for x in results)


def test_chunks_of_a_plan_do_not_change_the_sum(monkeypatch):
    """Rows of dk_idx are added chunk by chunk, in the plan's order: the same bits."""
    case, index, lse = drawn(b=2, sq=40, index_size=20, h=8, g=1)
    whole = by_sum(case, index, lse, row_weight(case), union_plan(case, index))
    monkeypatch.setattr(plan_module, "CHUNK_ROWS", 64)
    plan = union_plan(case, index)
    assert len(plan.chunks) > 3
    parts = by_sum(case, index, lse, row_weight(case), plan)
    assert all(torch.equal(a, b) for a, b in zip(whole[:2], parts[:2], strict=True))
    assert_close((parts[2],), (whole[2].double(),), 2e-6)  # fp32 sums in another grouping


def test_left_padding():
    rows = causal_rows(1, 70, DEVICE)
    check(sq=70, rows=RowRange(torch.full_like(rows.start, 37), rows.end))


def test_uncounted_rows_have_no_part():
    case, _, lse = drawn(sq=70)
    weight = (torch.arange(70, device=DEVICE) % 3 > 0).float()[None]
    total, dq, dk = by_sum(case, None, lse, weight)
    assert dq[:, ::3].eq(0).all()
    assert_close((total, dq, dk), exact(case, None, weight), 2e-5)


def test_large_scores_stay_finite():
    """Scores of a hundred and more: probabilities underflow, nothing overflows."""
    case, _, _ = drawn(torch.bfloat16, sq=70, d=64)
    with torch.no_grad():
        case.query.mul_(30.0)
    weight = torch.ones(1, 70, device=DEVICE)
    assert_close(by_sum(case, None, float64_lse(case, None), weight), exact(case, None, weight), 3e-2)


def test_without_gradient_only_the_value_is_made():
    case, _, lse = drawn(sq=70)
    arguments = case.query, case.key, lse, case.q_idx, case.k_idx, case.rows, None
    expected = triton_kd(*arguments, case.scale, case.index_scale)
    with torch.no_grad():
        rows = triton_kd(*arguments, case.scale, case.index_scale)
        total = triton_kd_sum(*arguments, torch.ones_like(rows), case.scale, case.index_scale)
    assert torch.equal(rows, expected) and not rows.requires_grad
    torch.testing.assert_close(total, rows.sum())


def test_strided_inputs():
    """Query and key as slices of wider projections."""
    case, _, lse = drawn(sq=50)
    with torch.no_grad():
        case.query = torch.stack([case.query, case.query], 3)[:, :, :, 0]
        case.key = torch.cat([case.key, case.key], -1)[..., :32]
    assert_close(by_sum(case, None, lse, row_weight(case)), exact(case, None, row_weight(case)), 2e-5)


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("mode", ["selected", "union"])
def test_ops_pass_opcheck(gradient, mode):
    case, index, lse = drawn(sq=33, index_size=8)
    plan, numbers = union_plan(case, index).flat() if mode == "union" else ([], [0])
    tensors = case.query.detach(), case.key.detach(), lse, case.q_idx, case.k_idx
    tensors = *tensors, case.rows.start, case.rows.end, None if plan else index
    given, scales = (plan, numbers), (case.scale, case.index_scale)
    ops = torch.ops.megatron_clsa
    if not gradient:
        tensors = [x if x is None else x.detach() for x in tensors]
    torch.library.opcheck(ops.kd_sum.default, (*tensors, *given, row_weight(case), *scales, gradient))
    torch.library.opcheck(ops.kd_rows.default, (*tensors, *given, *scales, gradient))
    detached = [x if x is None else x.detach() for x in tensors]
    torch.library.opcheck(ops.kd_keys.default, (*detached, *given, row_weight(case), *scales))


@pytest.mark.gpu
def test_the_dispatcher_takes_triton_on_a_gpu(monkeypatch):
    calls = []
    monkeypatch.setattr(indexer_kd, "triton_kd", lambda *a: calls.append(("rows", a[-1])))
    monkeypatch.setattr(indexer_kd, "triton_kd_sum", lambda *a: calls.append(("sum", a[-1])))
    case, index, lse = drawn(torch.bfloat16, sq=40, index_size=9)
    arguments = case.query, case.key, lse, case.q_idx, case.k_idx, case.rows, index
    dispatch.attention_kd(*arguments, case.scale, case.index_scale)
    plans = [dispatch.build_plan(index, case.rows, 40, 2, kernel) for kernel in ("union", "masked")]
    for plan in plans:
        dispatch.attention_kd_sum(*arguments, case.rows.end >= 0, case.scale, case.index_scale, plan)
    assert calls == [("rows", None), ("sum", plans[0]), ("sum", None)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("heads", [(4, 1), (8, 2), (5, 1), (20, 4), (6, 1), (14, 2), (32, 8), (8, 1)])
def test_the_sweep_for_hopper(dtype, d, heads):
    """Every group that it serves and the next larger, blocks of 128 and 64 keys, unions that fill none."""
    rows = packed_rows(2, 700, [411, 150], DEVICE)
    case, index, lse = drawn(
        dtype, b=2, sq=700, h=heads[0], g=heads[1], d=d, d_idx=d, rows=rows, index_size=60
    )
    plan, weight = union_plan(case, index), row_weight(case)
    inputs = kd_launch.Inputs(case.query, case.key, lse, case.q_idx, case.k_idx, rows, None, 1.0, 1.0)
    served = kd_union_launch.hopper_keys(inputs, plan)
    assert (served is not None) == (heads[0] // heads[1] < 8), served
    expected = exact(case, index, weight)
    assert_close(by_sum(case, index, lse, weight, plan), expected, TOLERANCE[dtype])
    assert_close(by_rows(case, index, lse, weight, plan), expected, TOLERANCE[dtype])
    with torch.no_grad():
        value = triton_kd_sum(
            case.query, case.key, lse, case.q_idx, case.k_idx, rows, index, weight, case.scale,
            case.index_scale, plan,
        )  # fmt: skip
    assert_close((value,), expected[:1], TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.large
@pytest.mark.parametrize("seq", [8192, 32768, 131072])
@pytest.mark.parametrize("mode", ["full", "selected", "union"])
def test_long_sequences_equal_float64(seq, mode):
    """20 heads over 4: sampled rows' values and gradients; the errors are printed: run with -rP."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(*shape):
        return torch.randn(1, seq, *shape, generator=generator, device=DEVICE).bfloat16()

    query, key, q_idx, k_idx = draw(20, 128), draw(4, 128), draw(128), draw(128)
    at = torch.cat([torch.arange(end - 16, end) for end in range(seq // 4, seq + 1, seq // 4)]).to(DEVICE)
    rows = causal_rows(1, seq, DEVICE)
    index = plan = None
    if mode != "full":
        index = (torch.arange(2048, device=DEVICE)[None] * 17 + rows.end[0, :, None]) % (seq // 8)
        index = index.sort(-1).values.int()
        index = torch.where(index > rows.end[0, :, None], -1, index)[None]
    if mode == "union":
        plan = build_union_plan(index, rows, seq, queries_of_tile(5, 64))
    lse = torch.full((1, 20, seq), float("-inf"), device=DEVICE)
    sampled = take_rows(rows, at)
    chosen = None if index is None else index[:, at]
    exact = query[:, at].double(), key.double()
    exact_lse = streaming_attention(*exact, exact[1], sampled, 128**-0.5, chosen)[1]
    lse[:, :, at] = exact_lse.float()
    weight = torch.zeros(1, seq, device=DEVICE)
    weight[:, at] = 1.0
    ce, dq, dk = indexer_kd.run_sweep(
        query, key, lse, q_idx, k_idx, rows, index, weight, 128**-0.5, 128**-0.5, True, plan=plan
    )
    small = q_idx[:, at].double().requires_grad_(), k_idx.double().requires_grad_()
    scales = 128**-0.5, 128**-0.5
    expected = streaming_kd(*exact, exact_lse, *small, sampled, chosen, *scales)
    gradients = torch.autograd.grad(expected.sum(), small)
    for what, got, want in (
        ("ce", ce[:, at], expected),
        ("dq", dq[:, at], gradients[0]),
        ("dk", dk, gradients[1]),
    ):
        print(f"{seq} {mode} {what}: {(got - want).abs().max():.1e} of {want.abs().max():.1e}")
    assert_close((ce[:, at], dq[:, at], dk), (expected, *gradients), 1.5e-2)
