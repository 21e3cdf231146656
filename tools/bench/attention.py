"""Rows of attention: sparse from an index (overlapping and random), dense and windowed, against cuDNN.

Owns the cases and the peers; the kernels are what `megatron_clsa.kernels.dispatch` chooses.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from bench.harness import Comparison, Settings, family, length_name
from bench.sparse_index import overlapping_index
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from megatron_clsa.kernels import dispatch
from megatron_clsa.kernels.mask_plan import MaskPlan, mask_bytes, mask_queries
from megatron_clsa.kernels.rows import causal_rows
from megatron_clsa.kernels.sparse_choice import MOST_MASK_BYTES

HEADS, GROUPS, DIM, SELECTED, WINDOW, LAYERS = 20, 4, 128, 2048, 512, 16
SCALE = DIM**-0.5
# Neighbours that share 7/8: 25 consecutive queries need about 4 k = 8192 keys.
KINDS = {"": 8, "_random": 1}
# First word of a metric and the implementation it forces; `sparse` is what the dispatcher chooses.
FORCED = {"sparse": "auto", "union": "union", "masked": "masked"}


def cudnn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Dense causal attention of `[b, s, h, d]` tensors by cuDNN, through torch."""
    parts = [x.transpose(1, 2) for x in (query, key, value)]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True, scale=SCALE)


def _with_backward(attend: Callable[[], Tensor], inputs: list[Tensor]) -> None:
    out = attend()
    torch.autograd.grad(out, inputs, torch.ones_like(out))


def _tensors(settings: Settings, length: int) -> list[Tensor]:
    generator = torch.Generator(settings.device).manual_seed(length)
    draw = partial(torch.randn, device=settings.device, generator=generator)
    shapes = [(1, length, heads, DIM) for heads in (HEADS, GROUPS, GROUPS)]
    return [draw(*shape).to(settings.dtype).requires_grad_() for shape in shapes]


def _both(attend: Callable, inputs: list[Tensor], backward: bool) -> Callable:
    return partial(_with_backward, attend, inputs) if backward else attend


def _first(attend: Callable) -> Tensor:
    """The output of an attention that also returns its LSE."""
    return attend()[0]


@family("attention")
def attention_cases(settings: Settings) -> Iterator[Comparison]:
    for length in settings.lengths:
        inputs = _tensors(settings, length)
        for suffix, stay in KINDS.items():
            yield from _sparse(settings, length, inputs, suffix, stay)
        yield from _dense(settings, length, inputs)


def _sparse(settings: Settings, length: int, inputs: list[Tensor], suffix: str, stay: int):
    """Plan, forward, forward and backward of one kind of index."""
    rows, k = causal_rows(1, length, settings.device), min(SELECTED, length // 4)
    index = overlapping_index(length, k, stay, settings.device)
    shared = f"neighbours share {1 - 1 / stay:.3f}"
    dense = {"cuDNN dense causal": partial(cudnn, *inputs)}
    words = mask_bytes(1, length, length, mask_queries(HEADS // GROUPS))
    for word, kernel in FORCED.items():
        if kernel == "masked" and words > MOST_MASK_BYTES:
            continue
        peers = dense if kernel == "auto" else {}
        plan = partial(dispatch.build_plan, index, rows, length, HEADS // GROUPS, kernel)
        yield Comparison(
            metric=f"{word}_plan{suffix}_{length_name(length)}_ms",
            shape=f"s {length}, k {k}, {shared}; serves {LAYERS} layers",
            ours=plan,
            bytes=float(index.nbytes),
        )
        made = plan()
        sparse = partial(_first, partial(dispatch.sparse_attention, *inputs, index, rows, SCALE, made))
        for name, backward in (("fwd", False), ("fwd_bwd", True)):
            heads = f"{HEADS}/{GROUPS} heads of {DIM}"
            yield Comparison(
                metric=f"{word}_attention_{name}{suffix}_{length_name(length)}_ms",
                shape=f"{heads}, s {length}, k {k}, {shared}, {str(settings.dtype)[6:]}",
                ours=_both(sparse, inputs, backward),
                peers={peer: _both(call, inputs, backward) for peer, call in peers.items()},
                flops=float((index >= 0).sum()) * 4 * HEADS * DIM * (3.5 if backward else 1),
                extra=_executed(made),
            )
        del made, sparse


def _executed(plan) -> dict:
    """Which implementation a plan is for, and how much it executes."""
    if isinstance(plan, MaskPlan):
        return {"kernel": "masked", "live_blocks": plan.live_blocks}
    return {"kernel": "union", "union_rows": plan.union_rows} if plan else {}


def _dense(settings: Settings, length: int, inputs: list[Tensor]):
    """Dense and windowed attention, forward and backward."""
    rows = causal_rows(1, length, settings.device)
    dense = partial(_first, partial(dispatch.dense_attention, *inputs, rows, SCALE))
    window = partial(dispatch.window_attention, *inputs, rows.windowed(WINDOW), WINDOW, SCALE)
    for metric, ours, pairs in (
        ("dense_attention", dense, length**2 / 2),
        ("window_attention", window, length * min(WINDOW, length)),
    ):
        yield Comparison(
            metric=f"{metric}_fwd_bwd_{length_name(length)}_ms",
            shape=f"{HEADS}/{GROUPS} heads of {DIM}, s {length}, causal, {str(settings.dtype)[6:]}",
            ours=_both(ours, inputs, True),
            peers={"cuDNN dense causal": _both(partial(cudnn, *inputs), inputs, True)},
            flops=pairs * 4 * HEADS * DIM * 3.5,
        )
