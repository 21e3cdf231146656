"""Names the ranks that are slower than their peers, step after step: a hot GPU, a bad cable, a busy host.

Owns the timing of a rank's own work and the comparison. All ranks end a step together, so the time of a step
says nothing; what differs is how long a rank's forward passes and its reading of data take. They are compared
among ranks of one pipeline stage, which have the same layers. Ranks that share tensors or a sequence wait for
each other inside a layer and show the same time: such a group is named whole.

Megatron-core's `StragglerDetector` works on GPUs alone, prints extremes without a verdict, and has to be
called from the training script; nvidia-resiliency-ext is a package of its own and wraps CUPTI.
"""

import os
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core import mpu

from megatron_clsa.errors import say

WINDOW = 10  # steps between comparisons
PATIENCE = 3  # slow windows in a row before a rank is named; then it is named again each time that many pass


class Stopwatch:
    """Seconds inside `with` on this rank, added up: by CUDA events where the work is a GPU's.

    Events cost microseconds and wait for nothing; they are read once a window, when they have long passed.
    """

    def __init__(self):
        self.on_gpu = torch.cuda.is_available()
        self.laps: list[tuple] = []

    def __enter__(self):
        self.laps.append((self._now(),))

    def __exit__(self, *_):
        self.laps[-1] += (self._now(),)

    def _now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> float:
        """Seconds since the last call."""
        laps, self.laps = self.laps, []
        if not self.on_gpu:
            return sum(end - start for start, end in laps)
        for _, end in laps:
            end.synchronize()
        return sum(start.elapsed_time(end) for start, end in laps) / 1000


@dataclass
class Verdict:
    """Which ranks have been slow for how long.

    Attributes:
        factor: times the median of its stage from which a rank is slow.
        windows: slow ones in a row, by rank.
    """

    factor: float
    windows: dict[int, int] = field(default_factory=lambda: defaultdict(int))

    def judge(self, seconds: list[float], stages: list[int]) -> dict[int, float]:
        """Rank -> times the median of its stage, of those that are to be named now.

        Args:
            seconds, stages: of every rank in this window.
        """
        peers = defaultdict(list)
        for value, stage in zip(seconds, stages, strict=True):
            peers[stage].append(value)
        # Of two ranks the faster one is the measure: it shows what is possible.
        medians = {stage: statistics.median_low(values) for stage, values in peers.items()}
        named = {}
        for rank, (value, stage) in enumerate(zip(seconds, stages, strict=True)):
            ratio = value / max(medians[stage], 1e-9)
            self.windows[rank] = self.windows[rank] + 1 if ratio > self.factor else 0
            if self.windows[rank] and self.windows[rank] % PATIENCE == 0:
                named[rank] = ratio
        return named


class StragglerReport:
    """Collects every rank's times once in `WINDOW` steps, in one small gather, and warns on rank 0.

    Args:
        store: the ranks' common store; each rank leaves its host's name there.
        factor: of `Verdict`; 0 compares nothing.
        forward, data: the rank's times; `forward` includes `data`.
    """

    def __init__(self, store: dist.Store, rank: int, factor: float, forward: Stopwatch, data: Stopwatch):
        self.store, self.rank = store, rank
        self.verdict = Verdict(factor)
        self.forward, self.data = forward, data
        self.steps = 0
        store.set(f"host/{rank}", os.environ.get("SLURMD_NODENAME", os.uname().nodename))

    def after_step(self, step: int) -> None:
        """Every rank calls it after every step."""
        self.steps += 1
        if self.steps % WINDOW:
            return
        mine = [self.forward.take(), self.data.take(), float(mpu.get_pipeline_model_parallel_rank())]
        if not self.verdict.factor:
            return
        mine = torch.tensor(mine, dtype=torch.float64, device=torch.cuda.current_device())
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(every, mine)
        seconds, data, stages = torch.stack(every).T.tolist()
        named = self.verdict.judge(seconds, [int(stage) for stage in stages])
        if named and self.rank == 0:
            say(self._line(step, named, seconds, data))

    def _line(self, step: int, named: dict[int, float], seconds: list[float], data: list[float]) -> str:
        parts = []
        for rank in sorted(named, key=named.get, reverse=True)[:8]:
            host, took = self.store.get(f"host/{rank}").decode(), seconds[rank]
            share = data[rank] / max(took, 1e-9)
            parts.append(
                f"rank {rank} on {host} {named[rank]:.2f} x its stage's median "
                f"({took / WINDOW:.3g} s a step, {share:.0%} of it for data)"
            )
        more = f"; and {len(named) - 8} more" if len(named) > 8 else ""
        return f"WARNING: step {step}: slow for {PATIENCE * WINDOW} steps: {'; '.join(parts)}{more}"
