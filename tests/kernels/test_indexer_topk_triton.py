"""The Triton index equals the reference bit for bit: adversarial scores, odd shapes, any rows, any rank.

Owns the kernels of `indexer_topk.py`, in Triton's interpreter without a GPU and compiled with one. Integer
vectors make every score exact in any order of summation, so that equality can be asked of ties as well.
"""

import pytest
import torch
from kernel_cases import packed_rows, take_rows, zigzag_positions

from megatron_clsa.kernels import dispatch, indexer_topk, reference, topk_guess
from megatron_clsa.kernels.indexer_topk import triton_topk
from megatron_clsa.kernels.rows import RowRange, causal_rows
from megatron_clsa.kernels.streaming_topk import streaming_topk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LONG = 700  # more keys than the candidates kept for k = 16: the rows need a sampled bound


def integers(*shape, seed=0, span=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-span, span + 1, shape, generator=generator).float().to(DEVICE)


def last_rows(count, keys, batch=1):
    """Causal rows of the last `count` of `keys` positions."""
    return take_rows(causal_rows(batch, keys, DEVICE), torch.arange(keys - count, keys, device=DEVICE))


def check(q_idx, k_idx, rows, k, dtype=torch.bfloat16, **options):
    actual = triton_topk(q_idx.to(dtype), k_idx.to(dtype), rows, k, **options)
    assert actual.dtype == torch.int32
    assert torch.equal(actual, reference.topk_index(q_idx, k_idx, rows, k))
    return actual


@pytest.mark.parametrize("seq", [1, 63, 65])
@pytest.mark.parametrize("k", [1, 21, 2048])
def test_ties_go_to_the_smaller_position(seq, k):
    check(integers(1, seq, 16), integers(1, seq, 16, seed=1), causal_rows(1, seq, DEVICE), k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("d_idx", [32, 48, 128, 256])
def test_any_head_dim_and_dtype(dtype, d_idx):
    check(integers(1, 20, d_idx), integers(1, LONG, d_idx, seed=1), last_rows(20, LONG), 16, dtype)


@pytest.mark.parametrize("batch, count, k", [(1, 70, 16), (2, 20, 40)])
def test_rows_longer_than_the_buffer_are_exact(batch, count, k):
    q_idx, k_idx = integers(batch, count, 32), integers(batch, 1001, 32, seed=1)
    check(q_idx, k_idx, last_rows(count, 1001, batch), k)


@pytest.mark.parametrize("keys", [80, LONG])
def test_all_equal_rows_keep_the_first_positions(keys):
    """Beyond the buffer every row overflows and is recovered."""
    index = check(integers(1, 9, 16), torch.zeros(1, keys, 16, device=DEVICE), last_rows(9, keys), 16)
    assert torch.equal(index[0, 8].cpu(), torch.arange(16, dtype=torch.int32))


@pytest.mark.parametrize("keys", [80, LONG])
def test_minus_zero_equals_plus_zero(keys):
    k_idx = torch.zeros(1, keys, 16, device=DEVICE)
    k_idx[:, 1::2] = -0.0
    check(-integers(1, 9, 16).abs(), k_idx, last_rows(9, keys), 16)


@pytest.mark.parametrize("keys", [90, LONG])
def test_all_negative_scores(keys):
    check(-integers(1, 9, 16).abs() - 1, integers(1, keys, 16, seed=1).abs(), last_rows(9, keys), 16)


@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_sorted_scores(direction):
    k_idx = torch.zeros(1, LONG, 16, device=DEVICE)
    k_idx[0, :, 0] = direction * torch.arange(LONG, device=DEVICE)
    q_idx = torch.zeros(1, 9, 16, device=DEVICE)
    q_idx[..., 0] = 1.0
    check(q_idx, k_idx, last_rows(9, LONG), 16, torch.float32)


@pytest.mark.parametrize("ties", [15, 16, 17, 600])
def test_ties_that_straddle_k(ties):
    """5 better keys, then `ties` equal ones: the first 11 of those belong to the 16."""
    k_idx = torch.zeros(1, LONG, 16, device=DEVICE)
    k_idx[0, torch.arange(ties) * LONG // ties, 0] = 1.0
    k_idx[0, torch.arange(5) * 130 + 7, 0] = 2.0
    q_idx = torch.zeros(1, 9, 16, device=DEVICE)
    q_idx[..., 0] = 1.0
    check(q_idx, k_idx, last_rows(9, LONG), 16)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize("keys", [90, LONG])
def test_nan_and_minus_infinity_come_last(bad, keys):
    q_idx, k_idx = torch.zeros(1, 9, 16, device=DEVICE), integers(1, keys, 16, seed=1)
    q_idx[..., 0] = 1.0
    k_idx[:, ::2, 0] = bad
    check(q_idx, k_idx.nan_to_num(0.0, neginf=-1e4) if bad != bad else k_idx, last_rows(9, keys), 16)
    k_idx[:, 5:, 0] = bad
    check(q_idx, k_idx, last_rows(9, keys), 16)


def test_plus_infinity_comes_first():
    q_idx, k_idx = torch.zeros(1, 9, 16, device=DEVICE), integers(1, LONG, 16, seed=1)
    q_idx[..., 0] = 1.0
    k_idx[..., 1:] = 0.0
    k_idx[:, 100::200, 0] = float("inf")
    check(q_idx, k_idx, last_rows(9, LONG), 16)


def test_packed_documents_and_short_ones():
    rows = packed_rows(2, 200, [5, 60, 1, 90], DEVICE)
    index = check(integers(2, 200, 16), integers(2, 200, 16, seed=1), rows, 16)
    assert ((index == -1) | (index >= rows.start[..., None])).all()


def test_packed_documents_longer_than_the_buffer():
    whole = packed_rows(1, 1300, [13, 640], DEVICE)
    rows = take_rows(
        whole, torch.tensor([3, 12, 13, 500, 640, 652, 653, 665, 666, 1290, 1299], device=DEVICE)
    )
    check(integers(1, 11, 16), integers(1, 1300, 16, seed=1), rows, 16)


def test_left_padding_is_never_selected():
    rows = causal_rows(1, 130, DEVICE)
    rows = RowRange(torch.full_like(rows.start, 37), rows.end)
    index = check(integers(1, 130, 16), integers(1, 130, 16, seed=1), rows, 16)
    assert index[:, :37].eq(-1).all() and ((index == -1) | (index >= 37)).all()


def test_empty_rows_select_nothing():
    rows = causal_rows(1, 40, DEVICE)
    rows = RowRange(rows.start, torch.where(rows.end < 9, -1, rows.end))
    index = check(integers(1, 40, 16), integers(1, 40, 16, seed=1), rows, 8)
    assert index[:, :9].eq(-1).all()


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_index_is_identical_on_every_cp_rank(rank):
    """Also for unrounded scores: a pair's bits do not depend on the tile it falls into."""
    generator = torch.Generator().manual_seed(0)
    q_idx, k_idx = (torch.randn(1, 128, 32, generator=generator).to(DEVICE, torch.bfloat16) for _ in "qk")
    rows, positions = causal_rows(1, 128, DEVICE), zigzag_positions(128, rank, 4).to(DEVICE)
    whole = triton_topk(q_idx, k_idx, rows, 16)
    part = triton_topk(q_idx[:, positions], k_idx, take_rows(rows, positions), 16)
    assert torch.equal(whole[:, positions], part)


@pytest.mark.parametrize("position", [7, 90, 650])
def test_point_17_a_row_decoded_over_a_cache_selects_the_same(position):
    """One query against the keys so far; unrounded scores, rows shorter and longer than the buffer."""
    generator = torch.Generator().manual_seed(0)
    q_idx, k_idx = (torch.randn(1, LONG, 32, generator=generator).to(DEVICE, torch.bfloat16) for _ in "qk")
    at = torch.tensor([position - 1, position], device=DEVICE)
    rows = take_rows(causal_rows(1, LONG, DEVICE), at)
    prefill = triton_topk(q_idx[:, at], k_idx, rows, 16)
    one = take_rows(rows, torch.tensor([1], device=DEVICE))
    decoded = triton_topk(q_idx[:, at[1:]], k_idx[:, : position + 1], one, 16)
    assert torch.equal(decoded, prefill[:, 1:])


@pytest.mark.parametrize("chunk_rows", [1, 64, 128])
def test_any_chunk_gives_the_same(chunk_rows):
    check(
        integers(1, 150, 16),
        integers(1, 150, 16, seed=1),
        causal_rows(1, 150, DEVICE),
        9,
        chunk_rows=chunk_rows,
    )


def test_two_runs_are_bitwise_equal():
    q_idx, k_idx = integers(1, 30, 32).bfloat16(), integers(1, LONG, 32, seed=1).bfloat16()
    runs = [triton_topk(q_idx, k_idx, last_rows(30, LONG), 16) for _ in range(2)]
    assert torch.equal(*runs)


@pytest.mark.parametrize("deviations", [-12.0, 40.0])
def test_a_wrong_guess_costs_time_and_nothing_else(deviations, monkeypatch):
    """A bound that too few or too many scores reach: all long rows are recovered."""
    rank = max(1, int(32 / topk_guess.sample_stride(LONG) + deviations))
    monkeypatch.setattr(indexer_topk, "sample_rank", lambda k, stride: rank)
    monkeypatch.setattr(indexer_topk, "candidate_capacity", lambda k, stride: 256)
    check(integers(1, 9, 16), integers(1, LONG, 16, seed=1), last_rows(9, LONG), 32)


def test_no_query_sees_the_future():
    """Changing a key leaves every earlier row's index as it was."""
    q_idx, k_idx = integers(1, 120, 16), integers(1, 120, 16, seed=1)
    rows = causal_rows(1, 120, DEVICE)
    before = triton_topk(q_idx.half(), k_idx.half(), rows, 16)
    k_idx[:, 70] = 100.0
    after = triton_topk(q_idx.half(), k_idx.half(), rows, 16)
    assert torch.equal(before[:, :70], after[:, :70]) and not torch.equal(before, after)


def test_strided_inputs():
    both = integers(1, 90, 2, 16)
    check(both[:, :, 0], both[:, :, 1], causal_rows(1, 90, DEVICE), 16)


def test_op_passes_opcheck():
    rows = causal_rows(1, 20, DEVICE)
    arguments = (integers(1, 20, 16).half(), integers(1, 20, 16, seed=1).half(), rows.start, rows.end, 8, 64)
    torch.library.opcheck(torch.ops.megatron_clsa.topk_index.default, arguments)


@pytest.mark.parametrize("stride", [8, 16])
def test_capacity_leaves_room_for_the_expected_candidates(stride):
    for k in (16, 100, 1000, 2048, 4096):
        expected = stride * topk_guess.sample_rank(k, stride) * (1 + topk_guess.TOLERANCE)
        assert k < expected < topk_guess.candidate_capacity(k, stride)


@pytest.mark.parametrize("keys", [LONG, 1100])
def test_a_sample_of_one_in_sixteen_selects_the_same(keys, monkeypatch):
    """As from 64K keys on; also with more candidates than half of the lanes of `choose`."""
    monkeypatch.setattr(indexer_topk, "sample_stride", lambda keys: 16)
    check(integers(1, 30, 16, span=9), integers(1, keys, 16, seed=1, span=9), last_rows(30, keys), 20)
    monkeypatch.setattr(indexer_topk, "sample_rank", lambda k, stride: 25)
    check(integers(1, 30, 16, span=9), integers(1, keys, 16, seed=1, span=9), last_rows(30, keys), 20)


@pytest.mark.parametrize("dtype", indexer_topk.SUPPORTED)
def test_tiles_of_the_longest_vectors_fit_shared_memory(dtype):
    """Both operands of a product lie in shared memory; a block of an H100 may have 227 KiB."""
    stages = 1 if dtype == torch.float32 else indexer_topk.STAGES
    streamed = (1 + stages) * indexer_topk.exact_tile(dtype)
    for vectors in (2 * indexer_topk.sample_tile(dtype), streamed):
        assert vectors * 256 * dtype.itemsize <= 227 * 1024


@pytest.mark.gpu
def test_the_dispatcher_takes_triton_on_a_gpu(monkeypatch):
    calls = []
    monkeypatch.setattr(indexer_topk, "triton_topk", lambda *a: calls.append(a))
    dispatch.topk_index(integers(1, 8, 16), integers(1, 8, 16), causal_rows(1, 8, DEVICE), 4)
    assert calls


@pytest.mark.gpu
@pytest.mark.large
@pytest.mark.parametrize("k", [16, 1000, 2048, 4096])
@pytest.mark.parametrize("seq", [8192, 32768, 131072])
def test_long_sequences_equal_chunked_torch(seq, k):
    """Rows of every quarter of the sequence; 131072 x 2048 x 4096 B of candidates need 64-bit offsets."""
    q_idx, k_idx = integers(1, seq, 128, span=4).bfloat16(), integers(1, seq, 128, span=4, seed=1).bfloat16()
    rows = causal_rows(1, seq, DEVICE)
    actual = triton_topk(q_idx, k_idx, rows, k)
    sampled = torch.cat([torch.arange(at, at + 64) for at in range(seq // 4 - 64, seq, seq // 4)]).to(DEVICE)
    expected = streaming_topk(q_idx[:, sampled], k_idx, take_rows(rows, sampled), k, block_rows=64)
    assert torch.equal(actual[:, sampled], expected)


@pytest.mark.gpu
@pytest.mark.large
@pytest.mark.parametrize("seq", [8192, 32768, 131072])
def test_random_scores_are_selected_to_float64_rounding(seq):
    """No score left out exceeds a selected one by more than rounding of the fp32 sums; printed with -rP."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    q_idx, k_idx = (torch.randn(1, seq, 128, generator=generator, device=DEVICE).bfloat16() for _ in "qk")
    rows = causal_rows(1, seq, DEVICE)
    index = triton_topk(q_idx, k_idx, rows, 2048)[0, -64:].long()
    seen = last_rows(64, seq).mask(seq)[0]
    scores = (q_idx[0, -64:].double() @ k_idx[0].double().T).masked_fill(~seen, -1e9)
    worst = scores.gather(1, index).amin(1)
    left_out = scores.scatter(1, index, -1e9).amax(1)
    print(f"{seq}: {(left_out - worst).max().item():.1e} of {worst.max().item():.1f}")
    assert (left_out - worst).max() < 1e-4
    assert (index.diff(dim=1) > 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("d_idx", [32, 64, 128, 256])
def test_both_streaming_passes_select_the_same(d_idx, monkeypatch):
    """Bit for bit on unrounded scores: the Hopper version and the one for other chips."""
    generator = torch.Generator(DEVICE).manual_seed(d_idx)
    shape = (2, 5000, d_idx)
    q_idx, k_idx = (torch.randn(shape, generator=generator, device=DEVICE).half() for _ in "qk")
    rows = packed_rows(2, 5000, [4100, 7, 893], DEVICE)
    chosen = triton_topk(q_idx, k_idx, rows, 500)
    monkeypatch.setattr(indexer_topk, "_on_hopper", lambda q: False)
    assert torch.equal(chosen, triton_topk(q_idx, k_idx, rows, 500))
