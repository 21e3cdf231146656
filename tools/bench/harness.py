"""Times one kernel beside its peers in one process, and keeps the rows of docs/results/kernels.json.

Owns the registry of families, the clock and the file; owns no kernel and no peer: each family's module
(`topk.py` and its neighbours) yields `Comparison`s on tensors that both sides share.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

TENSOR_FLOPS = 989e12  # bf16 tensor cores of an H100, dense
SPIN_CYCLES = 10_000_000  # about 6 ms: more than the host needs to launch any call
HBM_BYTES = 3.0e12  # copy measured on an H100 80GB, docs/kernels.md


@dataclass(frozen=True)
class Settings:
    """What the command line asks of every family: sequence lengths, seconds a side, device, dtype."""

    lengths: tuple[int, ...]
    seconds: float
    device: torch.device
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Comparison:
    """One kernel call and the calls that it is held against, on the same tensors.

    Attributes:
        metric: name of the row, as `indexer_topk_128k_ms`; the unit is its last word, `ms`, or `mib` for
            peak memory instead of time.
        shape: what was timed, as `s 131072, k 2048, d_idx 128, bf16`.
        ours: the call to time; what it returns is dropped.
        peers: name to call; a call that raises is reported and left out.
        flops, bytes: least work of the task; they give the ceiling beside the figure.
        check: called once before the clock, raises when the result is wrong.
        extra: further figures of this case, written into the row as they are.
    """

    metric: str
    shape: str
    ours: Callable[[], object]
    peers: dict[str, Callable[[], object]] = field(default_factory=dict)
    flops: float = 0.0
    bytes: float = 0.0
    check: Callable[[], None] | None = None
    extra: dict = field(default_factory=dict)

    @property
    def ceiling_ms(self) -> float:
        """Time of the least work at the chip's peak: no kernel can be faster than this."""
        return 1e3 * max(self.flops / TENSOR_FLOPS, self.bytes / HBM_BYTES)


Family = Callable[[Settings], Iterator[Comparison]]
FAMILIES: dict[str, Family] = {}


def family(name: str) -> Callable[[Family], Family]:
    """Register a generator of comparisons; it frees each case's tensors before it yields the next."""

    def register(function: Family) -> Family:
        FAMILIES[name] = function
        return function

    return register


def length_name(tokens: int) -> str:
    """`32768` is `32k` in a metric's name."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def _milliseconds(call: Callable[[], object], device: torch.device, busy: bool = True) -> float:
    """Time of one call; on a `busy` GPU, as in a training step: earlier work hides the host's launches."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if busy:
        torch.cuda._sleep(SPIN_CYCLES)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def time_together(calls: dict[str, Callable], device: torch.device, seconds: float) -> dict[str, float]:
    """Median milliseconds of each call; they take turns, so that clocks and heat are the same for all."""
    once = {}
    for name, call in calls.items():
        call()  # compiles
        once[name] = _milliseconds(call, device)
    times = {name: [] for name in calls}
    rounds = int(min(50, max(3, seconds * 1e3 * len(calls) / max(sum(once.values()), 1e-3))))
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(_milliseconds(call, device))
    return {name: statistics.median(values) for name, values in times.items()}


def time_alone(call: Callable, device: torch.device) -> float:
    """Median milliseconds of a call that an idle GPU waits for: the host's launches count."""
    return statistics.median(_milliseconds(call, device, busy=False) for _ in range(3))


def peak_mib(call: Callable[[], object], device: torch.device) -> float | None:
    """MiB that the call holds at its peak beyond its inputs; None without CUDA."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def _usable(peers: dict[str, Callable]) -> dict[str, Callable]:
    kept = {}
    for name, call in peers.items():
        try:
            call()
            kept[name] = call
        except Exception as error:
            print(f"  peer {name} left out: {type(error).__name__}: {str(error)[:200]}", flush=True)
    return kept


def machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return f"{name}, torch {torch.__version__}"


def measure(case: Comparison, settings: Settings, command: str) -> list[dict]:
    """One row a peer (one in all without peers), timed together; ratio is ours / peer, below 1 is faster."""
    if case.check:
        case.check()
    memory = peak_mib(case.ours, settings.device)
    if case.metric.endswith("_mib"):
        return [_memory_row(case, memory, settings, command)]
    peers = _usable(case.peers)
    times = time_together({"": case.ours} | peers, settings.device, settings.seconds)
    common = {
        "metric": case.metric,
        "value": round(times[""], 4),
        "alone": round(time_alone(case.ours, settings.device), 4),
        "unit": case.metric.rsplit("_", 1)[-1],
        "shape": case.shape,
        "machine": machine(settings.device),
        "date": time.strftime("%Y-%m-%d"),
        "command": command,
        "ceiling": round(case.ceiling_ms, 4),
        "flops": case.flops,
        "bytes": case.bytes,
        "peak_memory_mib": memory,
        **case.extra,
    }
    names = list(peers) or [None]
    return [common | _against(name, times.get(name), times[""]) for name in names]


def _memory_row(case: Comparison, memory: float | None, settings: Settings, command: str) -> dict:
    """A row whose figure is peak memory; its ceiling is what the call returns."""
    return {
        "metric": case.metric,
        "value": memory,
        "unit": "mib",
        "shape": case.shape,
        "machine": machine(settings.device),
        "date": time.strftime("%Y-%m-%d"),
        "command": command,
        "ceiling": round(case.bytes / 2**20, 1),
        "bytes": case.bytes,
        "peak_memory_mib": memory,
        **case.extra,
    } | _against(None, None, 0.0)


def _against(peer: str | None, peer_ms: float | None, ours_ms: float) -> dict:
    if peer_ms is None:
        return {"peer": None, "peer_value": None, "ratio": None}
    return {"peer": peer, "peer_value": round(peer_ms, 4), "ratio": round(ours_ms / peer_ms, 4)}


def merge_rows(path: str, rows: list[dict]) -> None:
    """Replace the rows of the measured metrics in the file, keep the others, in the order of their names."""
    kept = []
    if os.path.exists(path):
        with open(path) as file:
            kept = json.load(file)
    measured = {row["metric"] for row in rows}
    merged = [row for row in kept if row["metric"] not in measured] + rows
    merged.sort(key=lambda row: (row["metric"], row["peer"] or ""))
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w") as file:
        json.dump(merged, file, indent=1)
        file.write("\n")
