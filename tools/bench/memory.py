"""Rows of peak memory beyond the inputs: index, plan, attention, distillation, and all of them at once.

Owns the cases; times of the same kernels are in the modules beside this one. For a fixed k every figure must
grow with the sequence's length and not with its square.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from bench.attention import DIM, GROUPS, HEADS, SCALE, SELECTED
from bench.harness import Comparison, Settings, family, length_name
from bench.kd import INDEX_DIM
from bench.sparse_index import overlapping_index
from torch import Tensor

from megatron_clsa.kernels import dispatch
from megatron_clsa.kernels.rows import RowRange, causal_rows


class _Layer:
    """Tensors of one layer at one length, and the calls whose memory is asked."""

    def __init__(self, settings: Settings, length: int):
        generator = torch.Generator(settings.device).manual_seed(length)
        shape = dict(device=settings.device, generator=generator, dtype=settings.dtype)
        heads = (HEADS, GROUPS, GROUPS)
        self.inputs = [torch.randn(1, length, n, DIM, **shape).requires_grad_() for n in heads]
        self.vectors = [torch.randn(1, length, INDEX_DIM, **shape).requires_grad_() for _ in range(2)]
        self.rows: RowRange = causal_rows(1, length, settings.device)
        self.length, self.k = length, min(SELECTED, length // 4)
        self.index = overlapping_index(length, self.k, 8, settings.device)

    def select(self) -> Tensor:
        return dispatch.topk_index(*(x.detach() for x in self.vectors), self.rows, self.k)

    def plan(self):
        return dispatch.build_plan(self.index, self.rows, self.length, HEADS // GROUPS, distilled=True)

    def attend(self, plan) -> None:
        out, _ = dispatch.sparse_attention(*self.inputs, self.index, self.rows, SCALE, plan)
        torch.autograd.grad(out, self.inputs, torch.ones_like(out))

    def distil(self, index: Tensor | None, lse: Tensor, plan=None) -> None:
        query, key, _ = (x.detach() for x in self.inputs)
        counted, scales = self.rows.end >= 0, (SCALE, INDEX_DIM**-0.5)
        loss = dispatch.attention_kd_sum(
            query, key, lse, *self.vectors, self.rows, index, counted, *scales, plan
        )
        torch.autograd.grad(loss, self.vectors)

    def everything(self) -> None:
        """One layer of a sparse step: index, plan, attention and its distillation, then the backward pass."""
        query, key, _ = (x.detach() for x in self.inputs)
        index = self.select()
        plan = dispatch.build_plan(index, self.rows, self.length, HEADS // GROUPS, distilled=True)
        out, lse = dispatch.sparse_attention(*self.inputs, index, self.rows, SCALE, plan)
        counted, scales = self.rows.end >= 0, (SCALE, INDEX_DIM**-0.5)
        loss = dispatch.attention_kd_sum(
            query, key, lse.detach(), *self.vectors, self.rows, index, counted, *scales, plan
        )
        torch.autograd.grad(
            (out, loss), self.inputs + self.vectors, (torch.ones_like(out), torch.ones_like(loss))
        )


def _calls(layer: _Layer, lse: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    yield "index", layer.select
    yield "plan", layer.plan
    yield "sparse_attention_fwd_bwd", partial(layer.attend, layer.plan())
    yield "kd_full", partial(layer.distil, None, lse)
    yield "kd_selected", partial(layer.distil, layer.index, lse, layer.plan())
    yield "layer", layer.everything


@family("memory")
def memory_cases(settings: Settings) -> Iterator[Comparison]:
    for length in settings.lengths:
        layer = _Layer(settings, length)
        lse = torch.full((1, HEADS, length), 9.0, device=settings.device)
        for name, call in _calls(layer, lse):
            yield Comparison(
                metric=f"memory_{name}_{length_name(length)}_mib",
                shape=f"{HEADS}/{GROUPS} heads of {DIM}, s {length}, k {layer.k}, d_idx {INDEX_DIM}, "
                f"{str(settings.dtype)[6:]}, beyond the inputs",
                ours=call,
                bytes=float(layer.index.nbytes) if name == "index" else 0.0,
            )
        del layer, lse
