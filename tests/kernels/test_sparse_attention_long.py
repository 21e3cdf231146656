"""Sparse attention, both implementations, at 8K, 32K and 128K on a GPU against float64; prints the errors.

Owns the reference at these lengths: one KV head and its query heads, a chunk of rows at a time, gradients
written out. Run with `-s` to see the figures that docs/kernels.md states.
"""

from functools import cache

import pytest
import torch

from megatron_clsa.kernels.mask_plan import build_mask_plan, mask_queries
from megatron_clsa.kernels.masked_attention import masked_attention
from megatron_clsa.kernels.plan import build_union_plan, queries_of_tile
from megatron_clsa.kernels.rows import causal_rows
from megatron_clsa.kernels.sparse_choice import UNION_ROWS
from megatron_clsa.kernels.union_attention import union_attention

HEADS, GROUPS, DIM, SELECTED = 20, 4, 128, 2048
GROUP = HEADS // GROUPS
SCALE = DIM**-0.5
LAST = slice(HEADS - GROUP, HEADS)  # query heads of the last KV head: the largest offsets


def _tensors(length: int):
    generator = torch.Generator("cuda").manual_seed(length)
    shapes = [(1, length, heads, DIM) for heads in (HEADS, GROUPS, GROUPS, HEADS)]
    return [torch.randn(shape, generator=generator, device="cuda").bfloat16() for shape in shapes]


@cache
def _index(length: int) -> torch.Tensor:
    """`[1, s, k]`: a key at random in each k-th of a query's past; eight neighbours draw alike."""
    generator = torch.Generator("cuda").manual_seed(1)
    slot = torch.arange(SELECTED, device="cuda")
    index = torch.empty(1, length, SELECTED, dtype=torch.int32, device="cuda")
    for first in range(0, length, 2048):
        query = torch.arange(first, first + 2048, device="cuda")[:, None]
        drawn = torch.rand(256, SELECTED, device="cuda", generator=generator).repeat_interleave(8, 0)
        key = ((slot + drawn) * ((query + 1).double() / SELECTED)).long().minimum(query)
        index[0, first : first + 2048] = torch.where(
            query < SELECTED, torch.where(slot <= query, slot, -1), key
        )
    return index


@cache
def _expected(length: int) -> dict[str, torch.Tensor]:
    """Output, LSE and gradients of the last KV head in float64."""
    query, key, value, dout = (x.double() for x in _tensors(length))
    query, dout = query[0, :, LAST], dout[0, :, LAST]
    key, value = key[0, :, -1].contiguous(), value[0, :, -1].contiguous()
    found = {"out": torch.empty_like(query), "dquery": torch.empty_like(query)}
    found |= {"lse": query.new_empty(GROUP, length)}
    found |= {"dkey": torch.zeros_like(key), "dvalue": torch.zeros_like(value)}
    for first in range(0, length, 1024):
        rows, seen = slice(first, first + 1024), first + 1024
        chosen = torch.zeros(1024, seen + 1, dtype=torch.bool, device="cuda")
        index = _index(length)[0, rows].long()
        chosen.scatter_(1, torch.where(index < 0, seen, index), True)
        for head in range(GROUP):
            q, do, k, v = query[rows, head], dout[rows, head], key[:seen], value[:seen]
            score = (q @ k.T).mul_(SCALE).masked_fill_(~chosen[:, :seen], float("-inf"))
            lse = score.logsumexp(1)
            weight = score.sub_(lse[:, None]).exp_()
            out = weight @ v
            found["out"][rows, head], found["lse"][head, rows] = out, lse
            found["dvalue"][:seen] += weight.T @ do
            dscore = (do @ v.T).sub_((out * do).sum(1)[:, None]).mul_(weight).mul_(SCALE)
            found["dquery"][rows, head] = dscore @ k
            found["dkey"][:seen] += dscore.T @ q
    return found


def _actual(kernel: str, length: int) -> list[torch.Tensor]:
    query, key, value, dout = _tensors(length)
    inputs = [x.requires_grad_() for x in (query, key, value)]
    rows = causal_rows(1, length, "cuda")
    if kernel == "masked":
        plan = build_mask_plan(_index(length), rows, length, mask_queries(GROUP))
        out, lse = masked_attention(*inputs, plan, SCALE)
    else:
        plan = build_union_plan(_index(length), rows, length, queries_of_tile(GROUP, UNION_ROWS))
        out, lse = union_attention(*inputs, plan, SCALE)
    return [out, lse, *torch.autograd.grad(out, inputs, dout)]


@pytest.mark.gpu
@pytest.mark.large
@pytest.mark.parametrize("length", [8192, 32768, 131072])
@pytest.mark.parametrize("kernel", ["union", "masked"])
def test_point_9_long_sequences_equal_float64(kernel, length):
    out, lse, dquery, dkey, dvalue = _actual(kernel, length)
    again = _actual(kernel, length) if length == 8192 else None
    assert again is None or all(
        torch.equal(a, b) for a, b in zip(again, (out, lse, dquery, dkey, dvalue), strict=True)
    )
    expected = _expected(length)
    actual = {"out": out[0, :, LAST], "lse": lse[0, LAST], "dquery": dquery[0, :, LAST]}
    actual |= {"dkey": dkey[0, :, -1], "dvalue": dvalue[0, :, -1]}
    errors = {name: ((actual[name] - want).norm() / want.norm()).item() for name, want in expected.items()}
    print(f"\n{kernel} {length}: error in norm " + ", ".join(f"{k} {v:.1e}" for k, v in errors.items()))
    assert errors.pop("lse") < 1e-6  # fp32
    assert max(errors.values()) < 8e-3  # bf16 keeps 8 bits: 2e-3 for one rounding; four meet in a gradient
