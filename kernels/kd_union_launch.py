"""Launches of the distillation over a union plan: blocks, scratch, and the walk over the plan's chunks.

Owns memory and launches; the arithmetic is in `kd_union.py`. Rows of dk_idx are kept for one of the plan's
chunks at a time, and each key's are added before the next chunk is made.
Axes: b batch, sq queries, sk keys, h heads, g KV heads, di index dim, p rows of the plan.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from megatron_clsa.kernels import kd_union
from megatron_clsa.kernels.device import copied_by_16_bytes, on_hopper
from megatron_clsa.kernels.kd_launch import LOG2E, Inputs, cross_entropy
from megatron_clsa.kernels.kd_union_hopper import union_sweep_hopper
from megatron_clsa.kernels.plan import UnionPlan
from megatron_clsa.kernels.union_backward import sum_rows


@dataclass(frozen=True)
class Launch:
    """Keys of a block, columns of the largest product, warps of a program and loads in flight."""

    keys: int = 64
    columns: int = 64
    warps: int = 4
    stages: int = 2


def default_launch(query: Tensor) -> Launch:
    """What was fastest on an H100 for 128 dims; fp32 products are unrolled on the plain arithmetic units."""
    if query.dtype == torch.float32:
        return Launch(keys=32, columns=32, stages=1)
    return Launch(stages=1) if query.shape[-1] > 128 else Launch()


_REST = {4: 0, 5: 16, 6: 32, 7: 64}  # columns that a group needs beside its first four heads' 64
_SHARED_BYTES = 227 * 1024  # of a multiprocessor


def hopper_keys(inputs: Inputs, plan: UnionPlan) -> int | None:
    """Keys of a block of the sweep for Hopper, the most that leave room for all heads; None: not served."""
    query, key, q_idx = inputs.query, inputs.key, inputs.q_idx
    d, kv = query.shape[3], key.shape[2]
    rest = _REST.get(query.shape[2] // kv)
    aligned = copied_by_16_bytes(query, key, q_idx, inputs.k_idx)
    half = query.dtype in (torch.bfloat16, torch.float16)
    if not (half and on_hopper(query) and aligned and d in (64, 128) and q_idx.shape[2] == d):
        return None
    if rest is None or plan.queries > 16:
        return None
    for keys in (128, 64):
        rows = 3 * keys + kv * (64 + rest) + 2 * 16 + keys  # ring, heads, the indexer's, one way out
        if 2 * d * rows + 4 * kv * (64 + rest) + 2 * 16 * keys + 1024 <= _SHARED_BYTES:
            return keys
    return None


class UnionSweep:
    """One call: the options that its kernels share, and the walk over the chunks of the plan."""

    def __init__(self, inputs: Inputs, plan: UnionPlan, weight: Tensor | None, want_dq: bool, launch: Launch):
        self.inputs, self.plan, self.weight, self.want_dq = inputs, plan, weight, want_dq
        self.b, self.sq, self.h, d = inputs.query.shape
        self.sk, self.kv = inputs.key.shape[1:3]
        self.di = inputs.q_idx.shape[-1]
        self.hopper = hopper_keys(inputs, plan)
        self.wide = max(16, triton.next_power_of_2(self.di))
        self.tiles = triton.cdiv(self.sq, plan.queries)
        columns = max(16, triton.next_power_of_2(plan.queries))  # the least that a product's inner side takes
        self.shared = {
            "T": plan.queries,
            "C": columns,
            "DI": self.di,
            "D": self.wide,
            "BLOCK": launch.keys,
            "PRECISION": "ieee" if inputs.query.dtype == torch.float32 else "tf32",
            "num_warps": launch.warps,
            "STAGES": launch.stages,
        }
        self.heads = {
            "KV": self.kv,
            "G": self.h // self.kv,
            "HEAD": d,
            "TOGETHER": max(1, launch.columns // columns),
        }

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """ce `[b, sq]`, dq `[b, sq, di]` unweighted, dk `[b, sk, di]` weighted, all fp32."""
        new = {"dtype": torch.float32, "device": self.inputs.query.device}
        product = torch.empty(self.b, self.sq, **new)
        dq = torch.empty(self.b, self.sq if self.want_dq else 0, self.di, **new)
        dk = torch.empty(self.b, self.sk if self.weight is not None else 0, self.wide, **new)
        index_lse = self._index_lse()
        weighted = scratch = None
        if self.weight is not None:
            # With the scale, which is below 1: a row is a sum over queries, and fp16 ends at 65504.
            weight = (self.weight * self.inputs.index_scale)[..., None]
            weighted = (self.inputs.q_idx * weight).to(self.inputs.q_idx.dtype)
            rows = max(p1 - p0 for p0, p1 in (chunk.rows for chunk in self.plan.chunks))
            scratch = self.inputs.q_idx.new_empty(rows, self.wide)
        for chunk in self.plan.chunks:
            self._sweep(chunk, index_lse, weighted, product, dq, scratch)
            if scratch is not None:
                sum_rows[(self.b * self.sk, 1)](
                    scratch, chunk.key_offsets, chunk.entries, dk, FIRST=chunk is self.plan.chunks[0],
                    WIDTH=self.wide, BLOCK=4, num_warps=1,
                )  # fmt: skip
        ce = cross_entropy(index_lse, product, self.h)
        return ce, dq.mul_(self.inputs.index_scale), dk[..., : self.di].contiguous()

    def _index_lse(self) -> Tensor:
        """`[b, sq]` log2 of the sum of exp(I) over the selected keys, -inf in empty rows."""
        inputs, plan = self.inputs, self.plan
        lse = torch.empty(self.b, self.sq, dtype=torch.float32, device=inputs.query.device)
        kd_union.union_index_lse[(plan.order.numel(),)](
            inputs.q_idx, inputs.k_idx, plan.keys, plan.members, plan.offsets, plan.order, lse,
            inputs.index_scale * LOG2E, self.tiles, self.sq, self.sk, **self.shared,
        )  # fmt: skip
        return lse

    def _sweep(self, chunk, index_lse, weighted, product, dq, scratch) -> None:
        """Fill the chunk's rows of `product`, `dq` and, for its keys, `scratch`."""
        inputs, plan = self.inputs, self.plan
        (t0, t1), (p0, _) = chunk.tiles, chunk.rows
        arguments = (
            inputs.query, inputs.key, inputs.lse, inputs.q_idx, weighted, inputs.k_idx, index_lse,
            plan.keys, plan.members, plan.offsets, product, dq, scratch,
            inputs.scale * LOG2E, inputs.index_scale * LOG2E, t1, p0,
            self.tiles, self.sq, self.sk, *inputs.query.stride()[:3], *inputs.key.stride()[:3],
        )  # fmt: skip
        wanted = {"WANT_DQ": self.want_dq, "WANT_DK": scratch is not None}
        if self.hopper is None:
            kd_union.union_sweep[(t1 - t0,)](*arguments, **wanted, **self.heads, **self.shared)
        else:
            union_sweep_hopper[(t1 - t0,)](
                *arguments, **wanted, KV=self.kv, G=self.h // self.kv, T=plan.queries, D=self.di,
                BLOCK=self.hopper, num_warps=self.hopper // 16,
            )  # fmt: skip
