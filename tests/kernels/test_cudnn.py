"""cuDNN serves whole causal sequences and nothing else; on a GPU, it equals the reference there."""

import pytest
import torch
from kernel_cases import assert_as_exact_as_torch, make_case, packed_rows, take_rows, zigzag_positions

from megatron_clsa.kernels import cudnn, dispatch, flash, reference
from megatron_clsa.kernels.rows import RowRange, causal_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("batch", [1, 3])
def test_causal_rows_are_plain(batch):
    assert cudnn.plain_causal(causal_rows(batch, 40, DEVICE), 40, 40)


def test_other_rows_are_not_plain():
    whole = causal_rows(2, 64, DEVICE)
    documents = packed_rows(2, 64, [40, 24], DEVICE)
    shard = take_rows(whole, zigzag_positions(64, 0, 2).to(DEVICE))
    last = take_rows(whole, torch.arange(32, 64, device=DEVICE))
    assert not cudnn.plain_causal(documents, 64, 64)
    assert not cudnn.plain_causal(shard, 32, 64)
    assert not cudnn.plain_causal(last, 32, 64)
    assert not cudnn.plain_causal(RowRange(whole.start, whole.end + 1), 64, 65)
    assert not cudnn.plain_causal(RowRange(whole.start + 1, whole.end), 64, 64)
    assert not cudnn.plain_causal(RowRange(whole.start, whole.end - 1), 64, 64)
    one_packed = RowRange(torch.stack([whole.start[0], documents.start[1]]), whole.end)
    assert not cudnn.plain_causal(one_packed, 64, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("h, g, d, seq", [(4, 4, 64, 128), (5, 1, 128, 384), (20, 4, 128, 256)])
def test_cudnn_equals_the_reference(dtype, h, g, d, seq):
    rows = causal_rows(2, seq, DEVICE)
    case = make_case(b=2, sq=seq, h=h, g=g, d=d, rows=rows, device=DEVICE)
    results = []
    for precision, attend in (
        (dtype, lambda c: cudnn.cudnn_attention(c.query, c.key, c.value, c.scale)),
        (dtype, lambda c: reference.attention(c.query, c.key, c.value, rows, c.scale)),
        (torch.float64, lambda c: reference.attention(c.query, c.key, c.value, rows, c.scale)),
    ):
        moved = case.to(dtype).to(precision)
        out, lse = attend(moved)
        out.backward(torch.ones_like(out))
        results.append((out, lse, moved.query.grad, moved.key.grad, moved.value.grad))
    for got, own, want in zip(*results, strict=True):
        assert_as_exact_as_torch(got, own, want)


@pytest.mark.gpu
def test_point_7_a_very_negative_lse_keeps_the_gradient_finite():
    """Equal rows whose every score is -200: cuDNN's backward pass is known to fail at other lengths."""
    case = make_case(sq=256, h=4, g=1, d=64, device=DEVICE).to(torch.bfloat16)
    with torch.no_grad():
        case.query.fill_(5.0), case.key.fill_(-5.0)
    out, lse = cudnn.cudnn_attention(case.query, case.key, case.value, case.scale)
    out.backward(torch.ones_like(out))
    assert lse.max() < -88
    assert all(torch.isfinite(x.grad).all() for x in (case.query, case.key, case.value))


@pytest.mark.gpu
def test_the_dispatcher_chooses(monkeypatch):
    calls = []
    monkeypatch.setattr(cudnn, "cudnn_attention", lambda *a: calls.append("cudnn"))
    monkeypatch.setattr(flash, "flash_attention", lambda *a: calls.append("flash"))
    for rows in (causal_rows(1, 128, DEVICE), packed_rows(1, 128, [28, 100], DEVICE)):
        case = make_case(sq=128, d=64, device=DEVICE).to(torch.bfloat16)
        for deterministic in (False, True):
            torch.use_deterministic_algorithms(deterministic)
            dispatch.dense_attention(case.query, case.key, case.value, rows, case.scale)
    assert calls == ["cudnn", "flash", "flash", "flash"]
