"""Dense attention at 8K, 32K and 128K against float64, and memory that grows with the length, on a GPU.

Owns long sequences of dense attention and the peak memory of all kernels; the index and the distillation have
their long sequences in their own files. Errors are printed: run with -rP.
"""

import pytest
import torch
from kernel_cases import packed_rows, take_rows

from megatron_clsa.kernels import cudnn, dispatch, flash
from megatron_clsa.kernels.rows import causal_rows
from megatron_clsa.kernels.streaming_attention import streaming_attention

pytestmark = [pytest.mark.gpu, pytest.mark.large]
SCALE = 128**-0.5
IMPLEMENTATIONS = {
    "cudnn": lambda q, k, v, rows: cudnn.cudnn_attention(q, k, v, SCALE),
    "flash": lambda q, k, v, rows: flash.flash_attention(q, k, v, rows, SCALE),
}


def _drawn(seq: int, heads: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(1, seq, heads, 128, generator=generator, device="cuda")
    return x.bfloat16().requires_grad_()


def _layer(seq: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _drawn(seq, 20), _drawn(seq, 4, seed=1), _drawn(seq, 4, seed=2)


def _sampled(seq: int) -> torch.Tensor:
    """16 rows at the end of every quarter."""
    return torch.cat([torch.arange(end - 16, end) for end in range(seq // 4, seq + 1, seq // 4)]).cuda()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("seq", [8192, 32768, 131072])
def test_long_dense_attention_equals_float64(seq, name):
    """20 heads over 4; upstream gradient in sampled rows only, so that few rows make all gradients."""
    inputs, rows, at = _layer(seq), causal_rows(1, seq, "cuda"), _sampled(seq)
    out, lse = IMPLEMENTATIONS[name](*inputs, rows)
    direction = torch.zeros_like(out)
    direction[:, at] = 1.0
    gradients = torch.autograd.grad(out, inputs, direction)
    exact = [x.detach().double() for x in inputs]
    exact[0] = exact[0][:, at]
    exact = [x.requires_grad_() for x in exact]
    want, want_lse = streaming_attention(*exact, take_rows(rows, at), SCALE)
    wanted = torch.autograd.grad(want.sum(), exact)
    pairs = {
        "out": (out[:, at], want), "lse": (lse[:, :, at], want_lse), "dq": (gradients[0][:, at], wanted[0]),
        "dk": (gradients[1], wanted[1]), "dv": (gradients[2], wanted[2]),
    }  # fmt: skip
    for what, (got, want) in pairs.items():
        error, size = (got.double() - want).abs().max().item(), want.abs().max().item()
        print(f"{name} {seq} {what}: {error:.1e} of {size:.1e}")
        assert error <= 1.5e-2 * size, what


def test_packed_documents_at_128k_take_flash():
    rows = packed_rows(1, 131072, [50000, 3000, 17], "cuda")
    inputs, at = _layer(131072), _sampled(131072)
    out, lse = dispatch.dense_attention(*inputs, rows, SCALE)
    exact = [x.detach().double() for x in inputs]
    want, want_lse = streaming_attention(exact[0][:, at], *exact[1:], take_rows(rows, at), SCALE)
    assert (out[:, at] - want).abs().max() < 2e-2 and (lse[:, :, at] - want_lse).abs().max() < 1e-3


def _peak(call) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _index(seq: int) -> int:
    q_idx, k_idx = (_drawn(seq, 1, seed)[:, :, 0].detach() for seed in (3, 4))
    return _peak(lambda: dispatch.topk_index(q_idx, k_idx, causal_rows(1, seq, "cuda"), 512))


def _dense(seq: int) -> int:
    inputs, rows = _layer(seq), causal_rows(1, seq, "cuda")
    return _peak(lambda: torch.autograd.grad(dispatch.dense_attention(*inputs, rows, SCALE)[0].sum(), inputs))


def _distillation(seq: int) -> int:
    query, key, rows = _drawn(seq, 20).detach(), _drawn(seq, 4, 1).detach(), causal_rows(1, seq, "cuda")
    vectors = [_drawn(seq, 1, seed)[:, :, 0].detach().requires_grad_() for seed in (3, 4)]
    lse, counted = torch.full((1, 20, seq), 9.0, device="cuda"), rows.end >= 0

    def call():
        total = dispatch.attention_kd_sum(query, key, lse, *vectors, rows, None, counted, SCALE, SCALE)
        torch.autograd.grad(total, vectors)

    return _peak(call)


@pytest.mark.parametrize("measure", [_index, _dense, _distillation], ids=lambda f: f.__name__[1:])
def test_peak_memory_grows_no_faster_than_the_length(measure):
    """Bounded scratch may make it grow slower; twice the tokens never take more than twice the memory."""
    short, long = measure(32768), measure(65536)
    print(f"{measure.__name__[1:]}: {short / 2**20:.0f} MiB at 32K, {long / 2**20:.0f} MiB at 64K")
    assert long <= 2.05 * short
