"""What a run does when a step goes wrong: NaN, infinity, or a loss far above the recent ones.

Owns the decision, taken before the optimizer's step and on every rank alike from one reduced tensor, and the
alarms. Rolling back itself is run.py's: the phase starts again from its newest checkpoint without the data
of the bad step. The recent mean lives in memory: a resumed run collects it anew.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.training.async_utils import maybe_finalize_async_save

from megatron_clsa.errors import say

POLICIES = ("stop", "skip", "rollback")
MEMORY = 0.95  # share of the old mean that a step keeps
WARM_UP = 20  # steps before a mean is worth comparing with


class RollBack(Exception):
    """Leave the phase and enter it again without the data of `step`."""

    def __init__(self, step: int):
        super().__init__(f"roll back from step {step}")
        self.step = step


@dataclass(frozen=True)
class GuardSettings:
    """The user's flags.

    Attributes:
        on_nan: what a loss or gradient that is no number leads to, one of `POLICIES`.
        on_spike: what a loss above `spike_factor` x its recent mean leads to; "warn" goes on.
        max_bad_steps: of a phase in one process, then the run stops whatever the policy.
    """

    on_nan: str = "stop"
    on_spike: str = "warn"
    spike_factor: float = 2.0
    max_bad_steps: int = 10

    @staticmethod
    def of(args) -> "GuardSettings":
        return GuardSettings(args.on_nan, args.on_spike, args.spike_factor, args.max_bad_steps)


class RecentMean:
    """Exponential mean of a figure, and how far above it a new value lies."""

    def __init__(self):
        self.mean, self.count = 0.0, 0

    def ratio(self, value: float) -> float:
        """Over the mean; 1 while there is no mean worth the name."""
        return value / self.mean if self.count >= WARM_UP and self.mean > 0 else 1.0

    def add(self, value: float) -> None:
        self.count += 1
        keep = min(MEMORY, 1 - 1 / self.count)
        self.mean = keep * self.mean + (1 - keep) * value


class Guard:
    """Stands around Megatron's `train_step`.

    Args:
        training_step: step.py's, which collects the losses of a step.
        last_step: of the phase; it is skipped where others roll back, since its checkpoint must be written.
        bad_steps: so far; outlives a roll back.
    """

    def __init__(self, settings: GuardSettings, training_step, last_step: int, bad_steps: list[int]):
        self.settings, self.training_step = settings, training_step
        self.last_step, self.bad_steps = last_step, bad_steps
        self.losses, self.norms = RecentMean(), RecentMean()

    def __call__(self, train_step, forward_step, data_iterator, model, optimizer, *rest, **named):
        step, iteration = optimizer.step, named["iteration"] + 1

        def guarded():
            found = self._examine(model, iteration)
            return (False, None, None) if found == "skip" else step()

        optimizer.step = guarded
        try:
            return train_step(forward_step, data_iterator, model, optimizer, *rest, **named)
        finally:
            del optimizer.step

    def watch_gradient(self, norm: float | None, step: int) -> None:
        """Warn of a gradient norm ten times its recent mean; clipping has dealt with it."""
        if norm is None or not math.isfinite(norm):
            return
        if self.norms.ratio(norm) > 10:
            _warn(f"step {step}: gradient norm {norm:.3g} is {self.norms.ratio(norm):.1f} x its recent mean")
        self.norms.add(norm)

    def _examine(self, model, step: int) -> str:
        """ "go" or "skip"; raises to roll back or stop."""
        loss, culprit = _reduced(self.training_step.take_loss(), model)
        settings = self.settings
        if culprit is not None:
            return self._act(settings.on_nan, step, f"loss or gradient is not finite on rank {culprit}")
        ratio = self.losses.ratio(loss)
        if ratio > settings.spike_factor:
            reason = f"loss {loss:.4g} is {ratio:.2f} x its recent mean"
            if self._act(settings.on_spike, step, reason) == "skip":
                return "skip"
        self.losses.add(loss)
        return "go"

    def _act(self, policy: str, step: int, reason: str) -> str:
        if policy == "warn":
            _warn(f"step {step}: {reason}")
            return "go"
        self.bad_steps.append(step)
        stop = policy == "stop" or len(self.bad_steps) > self.settings.max_bad_steps
        if stop or (policy == "rollback" and step < self.last_step):
            maybe_finalize_async_save(blocking=True)  # a save that is under way is of good steps
        if stop:
            _warn(f"step {step}: {reason}; stopping, the newest checkpoint is whole", "error")
            raise SystemExit(1)
        if policy == "rollback" and step < self.last_step:
            _warn(f"step {step}: {reason}; back to the newest checkpoint, without this step's data")
            raise RollBack(step)
        _warn(f"step {step}: {reason}; its update is skipped")
        return "skip"


def _reduced(loss: torch.Tensor, model) -> tuple[float, int | None]:
    """(mean loss of the finite parts, a rank with a loss or gradient that is not), the same on every rank.

    A loss names its own rank; gradients have been summed over replicas by now and name some rank.

    Args:
        loss: `[2]` float64 on CPU, this rank's sum and count of the step; zeros where there is no loss.
    """
    world, rank, device = dist.get_world_size(), dist.get_rank(), torch.cuda.current_device()
    order = rank if not bool(torch.isfinite(loss).all()) else rank + world * (1 + _finite_gradients(model))
    total = torch.nan_to_num(loss, nan=0.0, posinf=0.0, neginf=0.0).to(device)
    first = torch.tensor(order, device=device)
    dist.all_reduce(total)
    dist.all_reduce(first, op=dist.ReduceOp.MIN)
    culprit = int(first) % world if int(first) < 2 * world else None
    return (total[0] / total[1].clamp(min=1)).item(), culprit


def _finite_gradients(model) -> bool:
    return all(
        bool(torch.isfinite(buffer.grad_data.norm()))
        for chunk in model
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
    )


def _warn(text: str, kind: str = "WARNING") -> None:
    if dist.get_rank() == 0:
        say(f"{kind}: {text}")
