"""Window attention alone, on one rank: windows and documents of odd lengths. Layouts: tests/parallel."""

from types import SimpleNamespace

import pytest
import torch

from megatron_clsa.model.window_attention import WindowAttention

ROWS, HEADS, GROUPS, WIDTH = 16, 4, 2, 8
LENGTHS = (1, 5, 1, 9)  # of the documents: one token, shorter than most windows below


def _documents() -> torch.Tensor:
    """`[2, 1, s]` int32: first and last visible row of each row."""
    start = torch.cat([torch.full((n,), sum(LENGTHS[:i])) for i, n in enumerate(LENGTHS)])
    return torch.stack([start, torch.arange(ROWS)])[:, None].to(torch.int32)


def _expected(query, key, value, rows, window: int) -> torch.Tensor:
    place = torch.arange(ROWS)
    seen = (place <= place[:, None]) & (place > place[:, None] - window) & (place >= rows[0, 0][:, None])
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key.repeat_interleave(HEADS // GROUPS, 2)) * WIDTH**-0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    values = value.repeat_interleave(HEADS // GROUPS, 2)
    return torch.einsum("bhqk,kbhd->qbhd", weights, values).flatten(2)


@pytest.mark.parametrize("window", [1, 2, 7, ROWS, ROWS + 1, 10**6])
def test_a_row_sees_its_window_of_its_own_document(window):
    """A window of a million rows must not cost more than the sequence: it once asked for 40 GB."""
    config = SimpleNamespace(sliding_window=window, kv_channels=WIDTH)
    groups = SimpleNamespace(cp=SimpleNamespace(size=lambda: 1))
    generator = torch.Generator().manual_seed(window)
    query, key, value = (
        torch.randn(ROWS, 1, heads, WIDTH, generator=generator) for heads in (HEADS, GROUPS, GROUPS)
    )
    rows = _documents()
    attention = WindowAttention(config, 1, None, None, pg_collection=groups)
    output = attention(query, key, value, rows)
    torch.testing.assert_close(output, _expected(query, key, value, rows, window), rtol=1e-5, atol=1e-6)
