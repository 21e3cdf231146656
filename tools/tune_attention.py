"""Time tilings of the sparse attention kernels on this GPU, each checked against the first; see --help.

Owns the candidates and the clock; the tilings in use are the table of kernels/masked_launch.py and the
constants of kernels/union_attention.py. Union kernels are timed as a whole forward or backward.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from bench.attention import DIM, GROUPS, HEADS, KINDS, SCALE, SELECTED
from bench.sparse_index import overlapping_index
from torch import Tensor

from megatron_clsa.errors import OneLineParser, UserError, one_line_errors
from megatron_clsa.kernels import masked_launch as launch
from megatron_clsa.kernels import sparse_choice, union_attention
from megatron_clsa.kernels.mask_plan import KEY_BLOCK
from megatron_clsa.kernels.masked_launch import Tiling
from megatron_clsa.kernels.rows import causal_rows
from megatron_clsa.kernels.union_attention import Launch

# Beside the table's entry for head dim 128, which comes first and is what the others are held against.
OTHERS = {
    "forward": [Tiling(64, 64, 4, 3), Tiling(128, 128, 8, 3), Tiling(128, 64, 8, 3)],
    "query_gradients": [Tiling(64, 64, 4, 2), Tiling(128, 64, 8, 2)],
    "key_gradients": [Tiling(64, 64, 4, 3), Tiling(64, 128, 8, 3)],
}
_TABLE = launch.tilings(torch.bfloat16, DIM)
CANDIDATES = {name: [getattr(_TABLE, name), *others] for name, others in OTHERS.items()}
# What differs from the constants of union_attention, the first of each being those at the time of writing.
UNION = {
    "union_forward": [{}, {"FORWARD": Launch(4, 4)}],
    "union_backward": [
        {},
        {"_on_hopper": lambda *tensors, rows: False},
        {"SUM_BLOCK": 2, "SUM_WARPS": 1},
        {"SUM_BLOCK": 8, "SUM_WARPS": 4},
    ],
}
STAY = {name.strip("_") or "overlapping": stay for name, stay in KINDS.items()}


def _parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--length", type=int, default=32768, metavar="TOKENS")
    names = [*CANDIDATES, *UNION]
    parser.add_argument("--kernels", nargs="+", choices=names, default=names)
    parser.add_argument("--kinds", nargs="+", choices=["overlapping", "random"], default=list(STAY))
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each (5); the median counts")
    return parser


def _milliseconds(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


@dataclass
class Problem:
    """Tensors of one layer and the index that every kernel reads."""

    query: Tensor
    key: Tensor
    value: Tensor
    dout: Tensor
    index: Tensor

    def plan(self, kernel: str):
        rows = causal_rows(1, self.index.shape[1], "cuda")
        return sparse_choice.make_plan(self.index, rows, self.index.shape[1], HEADS // GROUPS, kernel)


def _problem(length: int, stay: int) -> Problem:
    generator = torch.Generator("cuda").manual_seed(length)
    shapes = [(1, length, heads, DIM) for heads in (HEADS, GROUPS, GROUPS, HEADS)]
    tensors = [torch.randn(shape, generator=generator, device="cuda").bfloat16() for shape in shapes]
    index = overlapping_index(length, min(SELECTED, length // 4), stay, torch.device("cuda"))
    sizes = sparse_choice.sampled_sizes(index, causal_rows(1, length, "cuda"), length, HEADS // GROUPS)
    print(
        f"by sample: live blocks {sizes.live_blocks:.0f}, union rows {sizes.union_rows:.0f}; model: "
        f"masked {1e-6 * GROUPS * sizes.masked_cost(False):.1f} ms, "
        f"union {1e-6 * GROUPS * sizes.union_cost(False):.1f} ms"
    )
    return Problem(*tensors, index)


def _masked_calls(given: Problem, plan) -> dict[str, Callable[[Tiling], tuple[Tensor, ...]]]:
    """Each masked kernel as a function of its tiling."""
    query, key, value = given.query, given.key, given.value
    out, lse = launch.forward(query, key, value, plan, SCALE, CANDIDATES["forward"][0])
    packed = launch.pack(query, key, out, given.dout, lse, torch.zeros_like(lse), plan)
    shared = packed, key, value, plan, query.shape, SCALE
    return {
        "forward": partial(launch.forward, query, key, value, plan, SCALE),
        "query_gradients": lambda tiling: (launch.query_gradients(*shared, tiling),),
        "key_gradients": partial(launch.key_gradients, *shared),
    }


def _union_calls(given: Problem, plan) -> dict[str, Callable[[dict], tuple[Tensor, ...]]]:
    """Union forward and backward as functions of the constants that are replaced for the call."""
    inputs = [x.detach().requires_grad_() for x in (given.query, given.key, given.value)]
    out = union_attention.union_attention(*inputs, plan, SCALE)[0]

    def forward():
        return union_attention.union_attention(given.query, given.key, given.value, plan, SCALE)

    def backward():
        return torch.autograd.grad(out, inputs, given.dout, retain_graph=True)

    return {"union_forward": partial(_with, forward), "union_backward": partial(_with, backward)}


def _with(call: Callable, constants: dict):
    """The call's result while `union_attention` has these constants."""
    before = {name: getattr(union_attention, name) for name in constants}
    for name, constant in constants.items():
        setattr(union_attention, name, constant)
    try:
        return call()
    finally:
        for name, constant in before.items():
            setattr(union_attention, name, constant)


def _error(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Largest difference as a share of the largest value."""
    return max(
        ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()
        for a, b in zip(actual, expected, strict=True)
    )


def _tune(name: str, candidates: list, call: Callable, repeats: int, flops: float) -> None:
    """Time `call(candidate)` for each and print a line."""
    expected = None
    for candidate in candidates:
        begin = time.perf_counter()
        try:
            actual = call(candidate)
        except Exception as error:
            print(f"  {name:16} {candidate}  {type(error).__name__}: {str(error)[:90]}")
            continue
        torch.cuda.synchronize()
        first = time.perf_counter() - begin
        expected = expected or actual
        ms = _milliseconds(partial(call, candidate), repeats)
        print(
            f"  {name:16} {candidate or 'as is'}  {ms:8.3f} ms  {flops / ms / 1e9:5.0f} TFLOP/s executed  "
            f"differs {_error(actual, expected):.1e}  first call {first:.1f} s",
            flush=True,
        )


def _tune_kind(args, given: Problem) -> None:
    """All asked kernels on one problem."""
    kernels = {
        "masked": (CANDIDATES, _masked_calls, {"forward": 2, "query_gradients": 3, "key_gradients": 4}),
        "union": (UNION, _union_calls, {"union_forward": 2, "union_backward": 5}),
    }
    for kernel, (candidates, make_calls, products) in kernels.items():
        if not set(candidates) & set(args.kernels):
            continue
        plan = given.plan(kernel)
        keys = plan.live_blocks * KEY_BLOCK * 128 if kernel == "masked" else plan.union_rows * 64
        calls = make_calls(given, plan)
        for name in candidates:
            if name in args.kernels:
                flops = 2.0 * keys * DIM * GROUPS * products[name]
                _tune(name, candidates[name], calls[name], args.repeats, flops)
        del plan, calls


@one_line_errors
def main() -> None:
    args = _parser().parse_args()
    if not torch.cuda.is_available():
        raise UserError("tune_attention.py times kernels: run it on a machine with a GPU")
    for kind in args.kinds:
        print(f"{args.length} tokens, {kind} index", flush=True)
        _tune_kind(args, _problem(args.length, STAY[kind]))


if __name__ == "__main__":
    sys.exit(main())
