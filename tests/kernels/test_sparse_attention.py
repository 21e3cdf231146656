"""Sparse attention, union and masked tiles, against its float64 meaning; points of docs/kernels.md's list."""

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

from megatron_clsa.kernels import masked_attention as masked
from megatron_clsa.kernels import plan as plans
from megatron_clsa.kernels import reference
from megatron_clsa.kernels import union_attention as union
from megatron_clsa.kernels.mask_plan import build_mask_plan
from megatron_clsa.kernels.masked_attention import masked_attention
from megatron_clsa.kernels.plan import build_union_plan, queries_of_tile
from megatron_clsa.kernels.rows import RowRange, causal_rows
from megatron_clsa.kernels.union_attention import union_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BUILD = {"union": build_union_plan, "masked": build_mask_plan}
ATTEND = {"union": union_attention, "masked": masked_attention}
both = pytest.mark.parametrize("kernel", BUILD)


def _contiguous(*tensors):
    return tensors


def _seq_major(tensor):
    """`[b, s, ...]` held as `[s, b, ...]`, as hidden states are."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def _as_in_the_model(query, key, value):
    """K and V as views of one `[s, b, g * 2 d + 16]` tensor, gathered beside an indexer's 16 columns."""
    beside = key.new_full((key.shape[1], key.shape[0], 16), float("nan"))
    wide = torch.cat([torch.stack([key, value], 3).transpose(0, 1).flatten(2), beside], -1)
    key, value = wide[..., :-16].unflatten(-1, (-1, 2, key.shape[3])).transpose(0, 1).unbind(3)
    return _seq_major(query), key, value


def _run(kernel, case, index, queries, dtype=torch.float32, held=_contiguous):
    """Output, LSE and the three gradients of a random linear function; `held` gives the inputs' strides."""
    case = case.to(dtype)
    plan = BUILD[kernel](index, case.rows, case.key.shape[1], queries)
    out, lse = ATTEND[kernel](*held(case.query, case.key, case.value), plan, case.scale)
    direction = _direction(out)
    out.backward(direction if held is _contiguous else _seq_major(direction))
    return out, lse, case.query.grad, case.key.grad, case.value.grad


def _expected(case, index, dtype):
    case = case.to(dtype)
    out, lse = reference.attention(case.query, case.key, case.value, case.rows, case.scale, index)
    out.backward(_direction(out))
    return out, lse, case.query.grad, case.key.grad, case.value.grad


def _direction(out):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(out.shape, generator=generator).to(out)


def _check(kernel, case, index, queries, dtype=torch.float32, floor_ulps=64.0, held=_contiguous):
    actual = _run(kernel, case, index, queries, dtype, held)
    rounded = case.to(dtype)  # the reference starts from the same rounded inputs
    torch_own, exact = _expected(rounded, index, dtype), _expected(rounded, index, torch.float64)
    empty = exact[1] == float("-inf")
    assert torch.equal(actual[1].cpu() == float("-inf"), empty.cpu())
    finite = [x.masked_fill(empty, 0) for x in (actual[1], torch_own[1], exact[1])]
    assert_as_exact_as_torch(*finite)
    for got, own, want in zip(*(x[:1] + x[2:] for x in (actual, torch_own, exact)), strict=True):
        assert_as_exact_as_torch(got, own, want, floor_ulps)


@pytest.mark.parametrize("group", [1, 4, 5, 8, 16])
@both
def test_point_5_groups_that_are_no_power_of_two_with_neighbours_in_one_tile(kernel, group):
    case = make_case(sq=21, h=2 * group, g=2, d=16, device=DEVICE)
    _check(kernel, case, random_index(case.rows, 21, 9), queries_of_tile(group, 32))


@both
@pytest.mark.parametrize(
    "d, dtype",
    [
        (16, torch.float32),
        (64, torch.bfloat16),
        (128, torch.bfloat16),
        (128, torch.float16),
        (256, torch.bfloat16),
    ],
    ids=str,
)
def test_head_dims_and_dtypes(kernel, d, dtype):
    case = make_case(sq=35, h=5, g=1, d=d, device=DEVICE)
    _check(kernel, case, random_index(case.rows, 35, 12), 3, dtype)


@pytest.mark.parametrize("sq, k", [(1, 4), (7, 16), (65, 16), (130, 70), (65, 100)])
@both
def test_point_3_short_rows_and_sizes_that_divide_nothing(kernel, sq, k):
    case = make_case(sq=sq, h=4, g=2, d=16, device=DEVICE)
    _check(kernel, case, random_index(case.rows, sq, k), 8)


@both
def test_point_2_rows_without_any_key(kernel):
    rows = causal_rows(2, 33, DEVICE)
    rows = RowRange(torch.where(rows.end % 7 == 3, rows.end + 1, rows.start), rows.end)
    case = make_case(b=2, sq=33, h=4, g=2, d=16, rows=rows, device=DEVICE)
    _check(kernel, case, random_index(rows, 33, 6), 8)


@both
def test_an_index_that_selects_nothing(kernel):
    """On Hopper, of a shape that the walk for it takes."""
    case = make_case(sq=40, h=5, g=1, d=64, device=DEVICE)
    index = torch.full((1, 40, 6), -1, dtype=torch.int32, device=DEVICE)
    out, lse, *gradients = _run(kernel, case, index, 12, torch.bfloat16)
    assert not any(x.any() for x in (out, *gradients)) and (lse == float("-inf")).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@both
def test_a_row_with_a_score_that_is_no_number_has_no_lse_either(kernel, bad):
    """The LSE of -inf is that of a row without keys, which losses leave out."""
    case = make_case(sq=20, h=2, g=1, d=16, device=DEVICE)
    index = random_index(case.rows, 20, 6)
    case.query[0, 10, 0, 3] = bad
    case.key[0, :, 0, 3] = case.key[0, :, 0, 3].abs()  # infinite scores are +inf
    out, lse, *_ = _run(kernel, case, index, 8)
    want, want_lse = reference.attention(case.query, case.key, case.value, case.rows, case.scale, index)
    assert torch.equal(out.isnan(), want.isnan())
    assert torch.equal(lse.isnan(), ~want_lse.isfinite())  # the reference's is +inf where a score is


@both
def test_point_1_slots_of_minus_one_touch_nothing(kernel):
    case = make_case(sq=40, h=2, g=1, d=16, device=DEVICE)
    index = random_index(case.rows, 40, 12)
    wider = torch.cat([index, torch.full_like(index, -1)], -1)
    for a, b in zip(_run(kernel, case, index, 8), _run(kernel, case, wider, 8), strict=True):
        assert torch.equal(a, b)


@both
def test_point_4_a_key_named_twice_counts_once(kernel):
    case = make_case(sq=24, h=2, g=1, d=16, device=DEVICE)
    index = random_index(case.rows, 24, 5)
    for a, b in zip(_run(kernel, case, index, 8), _run(kernel, case, index.repeat(1, 1, 2), 8), strict=True):
        assert torch.equal(a, b)


@both
def test_point_15_packed_documents_in_a_batch(kernel):
    rows = packed_rows(3, 50, [3, 17, 9], DEVICE)
    case = make_case(b=3, sq=50, h=4, g=2, d=16, rows=rows, device=DEVICE)
    _check(kernel, case, random_index(rows, 50, 8), 8)


@pytest.mark.parametrize("rank", [0, 1])
@both
def test_context_parallel_rows_against_gathered_keys(kernel, rank):
    positions = zigzag_positions(64, rank, 2).to(DEVICE)
    rows = take_rows(causal_rows(1, 64, DEVICE), positions)
    case = make_case(sq=32, sk=64, h=5, g=1, d=16, rows=rows, device=DEVICE)
    _check(kernel, case, random_index(rows, 64, 10), 6)


@both
def test_point_6_a_row_whose_first_blocks_are_all_masked(kernel):
    case = make_case(sq=200, h=2, g=1, d=16, device=DEVICE)
    index = torch.full((1, 200, 8), -1, dtype=torch.int32, device=DEVICE)
    index[0, :199, 0] = 0
    index[0, 199, 0] = 199  # in the last block of a tile whose other queries fill the first
    index[0, 192:199] = torch.arange(64, 192, 16, device=DEVICE, dtype=torch.int32)
    _check(kernel, case, index, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@both
def test_point_9_the_models_strided_keys_and_values(kernel, dtype):
    rows = packed_rows(2, 40, [23, 9], DEVICE)
    case = make_case(b=2, sq=40, h=4, g=2, d=64, rows=rows, device=DEVICE)
    _check(kernel, case, random_index(rows, 40, 8), 8, dtype, held=_as_in_the_model)


@pytest.mark.gpu
@both
def test_point_9_more_heads_in_a_batch_than_a_grids_second_axis_holds(kernel):
    case = make_case(b=4100, sq=2, h=16, g=1, d=16, device=DEVICE)
    _check(kernel, case, random_index(case.rows, 2, 2), 4)


@both
def test_point_14_large_logits(kernel):
    case = make_case(sq=48, h=4, g=2, d=16, device=DEVICE)
    case.query, case.key = case.query * 30, case.key * 30
    index = random_index(case.rows, 48, 12)
    _, lse = reference.attention(case.query, case.key, case.value, case.rows, case.scale, index)
    # backward forms exp(score - lse) from a stored lse: what rounds it is a relative error of the weight
    _check(kernel, case, index, 8, floor_ulps=lse.abs().max().item())


@both
def test_point_7_a_very_negative_lse(kernel):
    case = make_case(sq=48, h=4, g=2, d=16, device=DEVICE)
    case.query, case.key = case.query.abs() + 8, -case.key.abs() - 5
    index = random_index(case.rows, 48, 12)
    _, lse = reference.attention(case.query, case.key, case.value, case.rows, case.scale, index)
    assert lse.max() < -150
    _check(kernel, case, index, 8, floor_ulps=lse.abs().max().item())


@both
def test_point_13_keys_that_nobody_selected_have_exactly_zero_gradient(kernel):
    case = make_case(sq=64, h=2, g=1, d=16, device=DEVICE)
    index = random_index(case.rows, 64, 6)
    index = torch.where(index % 3 == 0, index, -1)
    *_, dkey, dvalue = _run(kernel, case, index, 8)
    never = torch.arange(64) % 3 != 0
    assert not dkey[0, never].any() and not dvalue[0, never].any() and dkey[0, ~never].any()


@both
def test_point_10_two_runs_have_the_same_bits(kernel):
    case = make_case(sq=60, h=5, g=1, d=32, device=DEVICE)
    index = random_index(case.rows, 60, 20)
    for a, b in zip(_run(kernel, case, index, 12), _run(kernel, case, index, 12), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@both
def test_point_10_a_concurrent_stream_changes_no_bit(kernel):
    case = make_case(sq=4096, h=10, g=2, d=64, device=DEVICE).to(torch.bfloat16)
    inputs, direction = (case.query, case.key, case.value), torch.ones_like(case.query)
    plan = BUILD[kernel](random_index(case.rows, 4096, 512), case.rows, 4096, 12)

    def attend():
        out, lse = ATTEND[kernel](*inputs, plan, case.scale)
        return out, lse, *torch.autograd.grad(out, inputs, direction)

    alone, results = attend(), []
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for stream in streams * 4:
        with torch.cuda.stream(stream):
            if len(results) < 2:
                torch.cuda._sleep(20_000_000)  # about 12 ms, in which the host launches what follows
            results.append(attend())
    torch.cuda.synchronize()
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(alone, result, strict=True))


@pytest.mark.parametrize("kernel, huge", [("union", float("inf")), ("masked", 1e30)])  # 0 x inf is NaN
def test_point_12_a_later_key_changes_no_earlier_output(kernel, huge):
    case = make_case(sq=64, h=4, g=2, d=16, device=DEVICE)
    index = random_index(case.rows, 64, 10)
    before = _run(kernel, case, index, 8)
    case.key, case.value = case.key.clone(), case.value.clone()
    case.key[:, 40:], case.value[:, 40:] = 1e4, huge
    after = _run(kernel, case, index, 8)
    assert torch.equal(before[0][:, :40], after[0][:, :40])
    assert torch.equal(before[1][..., :40], after[1][..., :40])


@both
def test_point_16_a_plan_serves_four_layers_and_a_late_backward(kernel):
    """Layers with queries of their own read one K and V, whose gradients are sums over them (point 13)."""
    case = make_case(sq=40, h=4, g=2, d=16, device=DEVICE)
    others = [make_case(sq=40, h=4, g=2, d=16, device=DEVICE, seed=seed).query for seed in range(1, 5)]
    first, second = random_index(case.rows, 40, 8), random_index(case.rows, 40, 8, seed=3)
    plan = BUILD[kernel](first, case.rows, 40, 8)

    def gradients(attend, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (case.key, case.value, *others)]
        key, value, *queries = inputs
        outs = [attend(query, key, value)[0] for query in queries]
        _run(kernel, case, second, 8)  # another microbatch of the same shape comes between
        return torch.autograd.grad(outs, inputs, [x.to(dtype) for x in reversed(others)])

    def exact(query, key, value):
        return reference.attention(query, key, value, case.rows, case.scale, first)

    actual = gradients(lambda *x: ATTEND[kernel](*x, plan, case.scale), torch.float32)
    own, want = gradients(exact, torch.float32), gradients(exact, torch.float64)
    for gradient in zip(actual, own, want, strict=True):
        assert_as_exact_as_torch(*gradient)


@both
def test_point_17_a_row_decoded_over_a_cache_equals_prefill(kernel):
    case = make_case(sq=150, h=5, g=1, d=16, device=DEVICE)
    index = random_index(case.rows, 150, 40)
    plan = BUILD[kernel](index, case.rows, 150, 12)
    whole, whole_lse = ATTEND[kernel](case.query, case.key, case.value, plan, case.scale)
    for t in (0, 1, 70, 149):
        at, seen = slice(t, t + 1), slice(0, t + 1)
        rows = RowRange(case.rows.start[:, at], case.rows.end[:, at])
        plan = BUILD[kernel](index[:, at], rows, t + 1, 12)
        cached = case.query[:, at], case.key[:, seen], case.value[:, seen]
        out, lse = ATTEND[kernel](*cached, plan, case.scale)
        torch.testing.assert_close(out, whole[:, at], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(lse, whole_lse[:, :, at], rtol=1e-6, atol=1e-6)


@both
def test_point_17_one_query_over_many_keys(kernel):
    rows = take_rows(causal_rows(2, 700, DEVICE), torch.tensor([699], device=DEVICE))
    case = make_case(b=2, sq=1, sk=700, h=5, g=1, d=16, rows=rows, device=DEVICE)
    _check(kernel, case, random_index(rows, 700, 300), 12)


def test_chunks_of_the_backward_do_not_change_the_sum(monkeypatch):
    case = make_case(b=2, sq=40, h=2, g=1, d=16, device=DEVICE)
    index = random_index(case.rows, 40, 12)
    whole = _run("union", case, index, 8)
    monkeypatch.setattr(plans, "CHUNK_ROWS", 128)
    monkeypatch.setattr(plans, "SCRATCH_WORDS", 3 * 40)
    parts = _run("union", case, index, 8)
    assert len(build_union_plan(index, case.rows, 40, 8).chunks) > 3
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)  # fp32 sums in another grouping


@both
def test_the_gradient_of_the_lse(kernel):
    case = make_case(sq=30, h=4, g=2, d=16, device=DEVICE)
    index = random_index(case.rows, 30, 8)

    def gradient(lse_of, case):
        lse = lse_of(case)
        return torch.autograd.grad((lse * torch.arange(30, device=DEVICE)).sum(), (case.query, case.key))

    plan = BUILD[kernel](index, case.rows, 30, 8)
    got = gradient(
        lambda c: ATTEND[kernel](c.query, c.key, c.value, plan, c.scale)[1], case.to(torch.float32)
    )
    want = gradient(
        lambda c: reference.attention(c.query, c.key, c.value, c.rows, c.scale, index)[1],
        case.to(torch.float64),
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)  # sums of 30 terms up to 29


def test_the_plan_lists_every_selected_pair_once():
    rows = packed_rows(2, 70, [29, 11], DEVICE)
    index = random_index(rows, 70, 9)
    plan = build_union_plan(index, rows, 70, 8)
    selected = reference.selection_mask(index, rows, 70).cpu()
    rebuilt = torch.zeros_like(selected)
    for tile in range(plan.offsets.numel() - 1):
        batch, first = divmod(tile, 9)
        span = slice(*plan.offsets[tile : tile + 2].tolist())
        keys, members = plan.keys[span].cpu(), plan.members[span].cpu()
        live = keys[members != 0]
        assert torch.equal(live, live.unique()) and (span.stop - span.start) % plans.BLOCK == 0
        for i in range(min(8, 70 - 8 * first)):
            rebuilt[batch, 8 * first + i, keys[(members >> i) & 1 != 0].long()] = True
    assert torch.equal(rebuilt, selected)


@both
def test_the_operator_follows_torch_librarys_rules(kernel):
    operator = {"union": union, "masked": masked}[kernel]
    case = make_case(sq=20, h=2, g=1, d=16, device=DEVICE).to(torch.float32)
    plan = BUILD[kernel](random_index(case.rows, 20, 5), case.rows, 20, 8)
    arguments = (case.query, case.key, case.value, *plan.flat(), case.scale)
    torch.library.opcheck(operator._attend, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("held", [_contiguous, _as_in_the_model])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("group", [1, 2, 4, 5, 8, 16, 32])
def test_both_walks_give_the_same_bits(group, d, dtype, held, monkeypatch):
    """The Hopper version and the one for other chips, on packed rows of a batch, in several chunks."""
    case = make_case(
        b=2, sq=900, h=2 * group, g=2, d=d, rows=packed_rows(2, 900, [1, 690, 130], DEVICE), device=DEVICE
    )
    index, queries = random_index(case.rows, 900, 200), queries_of_tile(group, 64)
    monkeypatch.setattr(plans, "CHUNK_ROWS", 4096)
    taken = []
    chosen = union._on_hopper
    monkeypatch.setattr(union, "_on_hopper", lambda *x, **kw: taken.append(chosen(*x, **kw)) or taken[-1])
    hopper = _run("union", case, index, queries, dtype, held)
    assert taken == [queries * group > 32]  # 64 rows
    monkeypatch.setattr(union, "_on_hopper", lambda *tensors, rows: False)
    for a, b in zip(hopper, _run("union", case, index, queries, dtype, held), strict=True):
        assert torch.equal(a, b)
