"""The run's metrics file: one JSON object a line, one line a training step, one more an evaluation.

Owns the file and what a line holds. The figures come from Megatron's training log (steps) and from
evaluation.py; one rank writes, the last, because it holds the losses under pipeline parallelism.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.training.global_vars import get_timers
from megatron.training.utils import is_last_rank, reduce_max_stat_across_model_parallel_group


class MetricsFile:
    """Append-only JSON lines. A line is one `write` call, so a killed run leaves whole lines.

    `listener` is told every line, as it was written.
    """

    def __init__(self, path: Path, listener: Callable[[dict], None] = lambda record: None):
        self.path, self.listener = path, listener

    def append(self, record: dict):
        record = {key: _plain(value) for key, value in record.items()}
        line = json.dumps(record) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)
        self.listener(record)

    def truncate(self, position: dict):
        """Drop what an earlier run wrote beyond a position: it is about to be written again.

        Args:
            position: fields of the last step taken; `phase_step` 0 drops all lines of that phase.
        """
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text().splitlines() if not _is_after(line, position)]
        whole = self.path.with_suffix(".tmp")
        whole.write_text("".join(line + "\n" for line in kept))
        whole.replace(self.path)


def _is_after(line: str, position: dict) -> bool:
    try:
        record = json.loads(line)
        entered_again = record["phase"] == position["phase"] and position["phase_step"] == 0
        return record["step"] > position["step"] or entered_again
    except (ValueError, KeyError, TypeError):
        return True  # cut by a kill


def _plain(value):
    """Floats as JSON knows them: it has no infinity and no NaN."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class PhasePosition:
    """Where a phase lies in the run.

    Attributes:
        name: of the phase.
        first_step, first_tokens: steps taken and tokens consumed by the phases before it.
        tokens_per_step: of this phase.
    """

    name: str
    first_step: int
    first_tokens: int
    tokens_per_step: int

    def at(self, phase_step: int) -> dict:
        """The fields that place a line."""
        return {
            "step": self.first_step + phase_step,
            "phase": self.name,
            "phase_step": phase_step,
            "consumed_tokens": self.first_tokens + phase_step * self.tokens_per_step,
        }


class StepRecorder:
    """Writes a line a step. Stands around Megatron's `training_log`, which every rank calls every step.

    Args:
        mfu: share of the GPUs' peak of a step that took so many seconds; None where the peak is not known.
        watch_gradient: is told norm and step on every rank.
    """

    def __init__(
        self,
        file: MetricsFile,
        position: PhasePosition,
        mfu: Callable[[float], float | None],
        watch_gradient: Callable[[float | None, int], None],
    ):
        self.file, self.position, self.mfu, self.watch_gradient = file, position, mfu, watch_gradient
        self.seconds = 0.0  # what the step timer had counted when the last line was written

    def __call__(self, training_log, loss_dict, total_loss_dict, learning_rate, iteration, *rest, **named):
        # Under indexer-only training a stage without trainable parameters has no learning rate.
        rate = reduce_max_stat_across_model_parallel_group(learning_rate, group=named["pg_collection"].mp)
        step_time = self._lap()
        grad_norm = rest[3]  # after loss_scale, report_memory_flag and skipped_iter
        self.watch_gradient(grad_norm, iteration)
        if is_last_rank():
            self._write(loss_dict, iteration, rate, grad_norm, step_time)
        return training_log(loss_dict, total_loss_dict, learning_rate, iteration, *rest, **named)

    def _lap(self) -> float:
        """Seconds since the last call, evaluations and checkpoints left out."""
        timer = get_timers()("interval-time")
        timer.elapsed(reset=False)
        total = timer.active_time()
        self.seconds, lap = total, total - self.seconds
        return lap

    def _write(self, losses: dict, iteration: int, rate, grad_norm, step_time: float):
        self.file.append(
            self.position.at(iteration)
            | {
                "lm_loss": losses.get("lm loss"),
                "kd_loss": losses.get("kd loss"),
                **{name: losses[name] for name in ("teacher_kl", "hidden_loss") if name in losses},
                "grad_norm": grad_norm,
                "learning_rate": rate and float(f"{rate:.6g}"),  # it was reduced in fp32
                "tokens_per_second": self.position.tokens_per_step / max(step_time, 1e-9),
                "step_time": step_time,
                "mfu": self.mfu(step_time),
                "peak_memory_bytes": torch.cuda.max_memory_allocated(),
            }
        )
