"""Time tilings of the masked attention kernels on this GPU, each checked against the first; see --help.

Owns the candidates and the clock; the tilings in use are the table of kernels/masked_launch.py.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from bench.attention import DIM, GROUPS, HEADS, KINDS, SCALE, SELECTED
from bench.sparse_index import overlapping_index
from torch import Tensor

from megatron_clsa.errors import UserError, one_line_errors
from megatron_clsa.kernels import dispatch, sparse_choice
from megatron_clsa.kernels import masked_launch as launch
from megatron_clsa.kernels.masked_launch import Tiling
from megatron_clsa.kernels.rows import causal_rows

# The first of each is the table's entry for head dim 128 at the time of writing; none of them spills much.
CANDIDATES = {
    "forward": [
        Tiling(128, 64, 8, 3),
        Tiling(128, 64, 8, 2),
        Tiling(64, 64, 4, 3),
        Tiling(64, 64, 4, 2),
    ],
    "query_gradients": [
        Tiling(128, 64, 8, 2),
        Tiling(128, 64, 8, 3),
        Tiling(64, 64, 4, 2),
        Tiling(64, 64, 4, 3),
        Tiling(64, 64, 8, 3),
    ],
    "key_gradients": [
        Tiling(64, 128, 8, 2),
        Tiling(64, 128, 8, 3),
        Tiling(32, 128, 8, 3),
        Tiling(64, 64, 4, 2),
        Tiling(64, 64, 8, 3),
    ],
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=32768, metavar="TOKENS")
    parser.add_argument("--kernels", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
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


def _problem(length: int, stay: int):
    """Tensors, plan and packed rows of one kind of index."""
    generator = torch.Generator("cuda").manual_seed(length)
    shapes = [(1, length, heads, DIM) for heads in (HEADS, GROUPS, GROUPS, HEADS)]
    query, key, value, dout = (
        torch.randn(shape, generator=generator, device="cuda").bfloat16() for shape in shapes
    )
    rows = causal_rows(1, length, "cuda")
    index = overlapping_index(length, min(SELECTED, length // 4), stay, torch.device("cuda"))
    sizes = sparse_choice.sampled_sizes(index, rows, length, HEADS // GROUPS)
    plan = dispatch.build_plan(index, rows, length, HEADS // GROUPS, "masked")
    print(
        f"live blocks {plan.live_blocks}, by sample {sizes.live_blocks:.0f}; union rows by sample "
        f"{sizes.union_rows:.0f}; model: union {1e-6 * GROUPS * sizes.union_cost:.1f} ms, "
        f"masked {1e-6 * GROUPS * sizes.masked_cost:.1f} ms"
    )
    return query, key, value, dout, plan


def _calls(query, key, value, dout, plan) -> dict[str, Callable[[Tiling], tuple[Tensor, ...]]]:
    """Each kernel as a function of its tiling."""
    out, lse = launch.forward(query, key, value, plan, SCALE, CANDIDATES["forward"][0])
    packed = launch.pack(query, key, out, dout, lse, torch.zeros_like(lse), plan)
    given = packed, key, value, plan, query.shape, SCALE

    def query_gradients(tiling):
        return (launch.query_gradients(*given, tiling),)

    return {
        "forward": partial(launch.forward, query, key, value, plan, SCALE),
        "query_gradients": query_gradients,
        "key_gradients": partial(launch.key_gradients, *given),
    }


def _error(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Largest difference as a share of the largest value."""
    return max(
        ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()
        for a, b in zip(actual, expected, strict=True)
    )


def _tune(name: str, call: Callable, repeats: int, flops: float) -> None:
    expected = None
    for tiling in CANDIDATES[name]:
        begin = time.perf_counter()
        try:
            actual = call(tiling)
        except Exception as error:
            print(f"  {name:16} {tiling}  {type(error).__name__}: {str(error)[:90]}")
            continue
        torch.cuda.synchronize()
        first = time.perf_counter() - begin
        expected = expected or actual
        ms = _milliseconds(partial(call, tiling), repeats)
        print(
            f"  {name:16} {tiling}  {ms:8.3f} ms  {flops / ms / 1e9:5.0f} TFLOP/s executed  "
            f"differs {_error(actual, expected):.1e}  first call {first:.1f} s",
            flush=True,
        )


@one_line_errors
def main() -> None:
    args = _parser().parse_args()
    if not torch.cuda.is_available():
        raise UserError("tune_attention.py times kernels: run it on a machine with a GPU")
    for kind, stay in KINDS.items():
        print(f"{args.length} tokens, {kind.strip('_') or 'overlapping'} index", flush=True)
        query, key, value, dout, plan = _problem(args.length, stay)
        calls = _calls(query, key, value, dout, plan)
        product = 2.0 * plan.live_blocks * 64 * 128 * DIM * GROUPS  # one matrix product over all live blocks
        for name in args.kernels:
            products = {"forward": 2, "query_gradients": 3, "key_gradients": 4}[name]
            _tune(name, calls[name], args.repeats, products * product)


if __name__ == "__main__":
    sys.exit(main())
