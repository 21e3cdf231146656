"""Times optimizer steps of CLSA and of the dense GPT on the ranks of a process group, in turns.

Owns the clock, the trace of collectives and the two single exchanges; what is timed is `layouts.py`'s and
`dense_gpt.py`'s. Every function here runs on all ranks.
"""

import sys
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_clsa.parallel.context import _HaloExchange, gather_sequence
from multirank.dense_gpt import build_gpt, gpt_step, peer_name
from multirank.layouts import Case, Layout, build, make_config, run_batch
from multirank.resume import _optimizer
from multirank.traffic import Traffic, totals

WARM_UP = 2
IN_A_ROW = 10  # exchanges between two looks at the clock, so that launching one hides behind another


class Trainee:
    """A model and its optimizer: one side of a comparison. As in the recipes, the exchange of DP overlaps."""

    def __init__(self, layout: Layout, case: Case, dense: bool):
        self.layout, self.case = layout, case
        self.models = build_gpt(layout, case) if dense else build(layout, case, True, overlap=True)
        self.extra = (gpt_step,) if dense else ()
        _draw(self.models)
        self.optimizer = _optimizer(self.models, case)
        self.optimizer.reload_model_params()

    def step(self) -> None:
        self.optimizer.zero_grad()
        run_batch(self.layout, self.case, self.models, *self.extra)
        self.optimizer.step()

    def seconds(self) -> float:
        """Of one step, from the moment that all ranks are ready."""
        _wait()
        started = time.perf_counter()
        self.step()
        _synchronize()
        return time.perf_counter() - started


@torch.no_grad()
def _draw(models) -> None:
    """Random matrices, drawn where they lie: the builder's own are drawn on the CPU, which takes longer."""
    torch.manual_seed(1)
    for model in models:
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.02)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _wait() -> None:
    _synchronize()
    dist.barrier()
    _synchronize()


def timed(layout: Layout, case: Case, peer: bool, count: int, seconds: float) -> Iterator[dict]:
    """Two answers. First the seconds of `count` steps of each side, in turns, after two that are not counted:
    fewer steps than `count`, at least one, where the case has taken `seconds`. Then the bytes by link of one
    further step of each side, and the time of the NCCL kernels of another.
    """
    started = time.perf_counter()
    sides = {"ours": Trainee(layout, case, False)}
    if peer:
        sides["peer"] = Trainee(layout, case, True)
    found: dict = {name: [] for name in sides} | ({"peer_name": peer_name(case.work.impl)} if peer else {})
    for number in range(WARM_UP + count):
        for name, side in sides.items():
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            duration = side.seconds()
            found[name] += [duration] if number >= WARM_UP else []
            found[f"{name}_peak_bytes"] = torch.cuda.max_memory_allocated()
        if number >= WARM_UP and _any_late(time.perf_counter() - started > seconds):
            break
    yield found
    yield {name: _traced(side) for name, side in sides.items()}


def _any_late(late: bool) -> bool:
    flag = torch.tensor(float(late), device=torch.cuda.current_device())
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def _traced(side: Trainee) -> tuple[dict, dict]:
    """(received bytes by link, milliseconds by kind of NCCL kernel and how much of them overlaps)."""
    _wait()
    with Traffic() as traffic:
        side.step()
    _wait()
    return totals(traffic.by_link()), _profiled(side) if torch.cuda.is_available() else {}


def _profiled(side: Trainee) -> dict:
    """Empty where this machine does not let a process trace its kernels: the times are worth having alone."""
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            side.step()
            _synchronize()
        return nccl_times(_kernels(profile))
    except (RuntimeError, AttributeError) as error:
        print(f"no trace: {error}", file=sys.stderr)
        return {}


def _kernels(profile) -> list[tuple[str, int, int]]:
    """(name, start, end) of everything that ran on the GPU, ns."""
    events = profile.profiler.kineto_results.events()
    on_gpu = [event for event in events if event.device_type() == torch.autograd.DeviceType.CUDA]
    return [(e.name(), e.start_ns(), e.start_ns() + e.duration_ns()) for e in on_gpu if e.duration_ns()]


def nccl_times(kernels: list[tuple[str, int, int]]) -> dict[str, float]:
    """ms by kind of collective (waiting for other ranks included), and under `hidden` the part of all of
    them during which another kernel computed."""
    named = [(name.lower(), begin, end) for name, begin, end in kernels]
    nccl = [kernel for kernel in named if "nccl" in kernel[0]]
    ours = _union([(b, e) for name, b, e in named if "nccl" not in name and not name.startswith("mem")])
    theirs = _union([(b, e) for _, b, e in nccl])
    found: dict[str, float] = {}
    for name, begin, end in nccl:
        kind = next(
            (k for k in ("allgather", "reducescatter", "allreduce", "sendrecv") if k in name), "other"
        )
        found[kind] = found.get(kind, 0.0) + (end - begin) / 1e6
    return found | {"total": _length(theirs) / 1e6, "hidden": _common(ours, theirs) / 1e6}


def _union(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged


def _length(spans: list[tuple[int, int]]) -> int:
    return sum(end - begin for begin, end in spans)


def _common(spans, others) -> int:
    return _length(spans) + _length(others) - _length(_union([*spans, *others]))


def exchanges(layout: Layout, case: Case, count: int) -> dict:
    """Seconds of the memory's gather and of a window layer's halo, forward, alone; and the bytes received."""
    parallel_state.initialize_model_parallel(layout.tp, layout.pp, context_parallel_size=layout.cp)
    tensor_parallel.model_parallel_cuda_manual_seed(123)
    config, work, group = make_config(layout, case), case.work, parallel_state.get_context_parallel_group()
    device = torch.cuda.current_device()
    kv = 2 * config.num_query_groups * config.kv_channels // layout.tp
    memory = torch.randn(work.seq // layout.cp, 1, kv + config.index_head_dim, device=device).to(work.dtype)
    tails = [torch.randn(config.sliding_window - 1, 1, kv, device=device).to(work.dtype) for _ in range(2)]
    calls = {
        "gather": (lambda: gather_sequence(memory, group), memory.nbytes * (layout.cp - 1)),
        "halo": (
            lambda: _HaloExchange.apply(*tails, group),
            sum(x.nbytes for x in tails[: min(2, layout.cp - 1)]),
        ),
    }
    found = {}
    for name, (call, size) in calls.items():
        times = []
        for _ in range(WARM_UP + count):
            _wait()
            started = time.perf_counter()
            for _ in range(IN_A_ROW):
                call()
            _synchronize()
            times.append((time.perf_counter() - started) / IN_A_ROW)
        found[name] = times[WARM_UP:], size
    return found
