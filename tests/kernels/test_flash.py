"""Segments name exactly the visible pairs; on a GPU, FlashAttention over them equals the reference."""

import pytest
import torch
from kernel_cases import assert_as_exact_as_torch, make_case, packed_rows, take_rows, zigzag_positions

from megatron_clsa.kernels import reference
from megatron_clsa.kernels.flash import flash_attention, segments
from megatron_clsa.kernels.rows import RowRange, causal_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _shard(rank: int) -> RowRange:
    return take_rows(packed_rows(2, 64, [37, 20], DEVICE), zigzag_positions(64, rank, 2).to(DEVICE))


ROWS = {
    "causal": (lambda: causal_rows(2, 40, DEVICE), 40, True),
    "documents": (lambda: packed_rows(3, 50, [3, 17, 1, 9], DEVICE), 50, True),
    "shard_0": (lambda: _shard(0), 64, False),
    "shard_1": (lambda: _shard(1), 64, False),
}


def _visible(found, rows: RowRange, num_keys: int, window: int | None) -> torch.Tensor:
    """The mask that FlashAttention applies: causal from each segment's end, `window` wide."""
    b, sq = rows.end.shape
    mask = torch.zeros(b * sq, b * num_keys, dtype=torch.bool)
    packing = torch.arange(b * num_keys) if found.packing is None else found.packing.cpu()
    bounds = zip(
        *(x.tolist() for x in (found.query_offsets, found.query_offsets[1:])),
        *(x.tolist() for x in (found.key_offsets, found.key_offsets[1:])),
        strict=False,
    )
    for q0, q1, k0, k1 in bounds:
        for q in range(q0, q1):
            last = k1 - (q1 - q)
            first = k0 if window is None else max(k0, last - window + 1)
            mask[q, packing[first : last + 1]] = True
    blocks = mask.view(b, sq, b, num_keys)
    assert not any(blocks[i, :, j].any() for i in range(b) for j in range(b) if i != j)
    return torch.stack([blocks[i, :, i] for i in range(b)])


@pytest.mark.parametrize("window", [None, 1, 5, 200])
@pytest.mark.parametrize("name", ROWS)
def test_segments_name_the_visible_pairs(name, window):
    make, num_keys, packed = ROWS[name]
    rows = make()
    if window is not None:
        rows = rows.windowed(window)
    found = segments(rows, num_keys)
    assert torch.equal(_visible(found, rows, num_keys, window), rows.mask(num_keys).cpu())
    assert (found.packing is None) == packed or window is not None
    assert segments(rows, num_keys) is found


def test_a_row_without_keys_has_no_segments():
    rows = causal_rows(1, 8, DEVICE)
    assert segments(RowRange(rows.start + 1, rows.end), 8) is None


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("h, g, d", [(4, 4, 64), (5, 1, 128), (8, 2, 256)])
def test_flash_equals_the_reference(name, window, h, g, d):
    make, num_keys, _ = ROWS[name]
    rows = make() if window is None else make().windowed(window)
    b, sq = rows.end.shape
    case = make_case(b=b, sq=sq, sk=num_keys, h=h, g=g, d=d, rows=rows, device=DEVICE)
    results = []
    for dtype, attend in (
        (torch.bfloat16, lambda c: flash_attention(c.query, c.key, c.value, rows, c.scale, window)),
        (torch.bfloat16, lambda c: reference.attention(c.query, c.key, c.value, rows, c.scale)),
        (torch.float64, lambda c: reference.attention(c.query, c.key, c.value, rows, c.scale)),
    ):
        moved = case.to(torch.bfloat16).to(dtype)
        out, lse = attend(moved)
        out.backward(torch.ones_like(out))
        results.append((out, lse, moved.query.grad, moved.key.grad, moved.value.grad))
    for got, own, want in zip(*results, strict=True):
        assert_as_exact_as_torch(got, own, want)
