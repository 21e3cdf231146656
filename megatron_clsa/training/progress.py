"""What a person sees of a running phase: one line a step, and the same figures in TensorBoard and wandb.

Owns the wording and Megatron's writers (`--tensorboard-dir`, `--wandb-project`); the figures are made in
metrics.py and evaluation.py. Megatron's own line of the same step is left out.
"""

import datetime
import os
import secrets
import sys
from argparse import Namespace
from pathlib import Path

import torch
from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

from megatron_clsa.errors import say
from megatron_clsa.estimate import flops
from megatron_clsa.estimate.shape import RunShape
from megatron_clsa.estimate.speed import peak_tflops_of

PLACES = {"step", "phase", "phase_step", "consumed_tokens"}


def without_megatrons_line(print_rank_last, text: str) -> None:
    """Around Megatron's `print_rank_last`: what it says of a step (the time in brackets) or an evaluation."""
    if not text.startswith((" [", "---", " validation loss", "validation loss")):
        print_rank_last(text)


def nothing(original, *args, **named) -> None:
    """Around Megatron's `report_theoretical_memory`: it knows other models, estimate/memory.py knows ours."""


class Throughput:
    """Model FLOPs of a step over what the GPUs could do in its time.

    Args:
        shape: of the phase.
        peak_tflops: of one GPU; None looks the GPU's name up, and gives no MFU where that fails (CPU).
    """

    def __init__(self, shape: RunShape, peak_tflops: float | None):
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        peak = peak_tflops or peak_tflops_of(name)
        self.seconds_at_peak = flops.total(shape) / (shape.ranks * peak * 1e12) if peak else None

    def mfu(self, step_time: float) -> float | None:
        return self.seconds_at_peak and self.seconds_at_peak / max(step_time, 1e-9)


class Progress:
    """Listens to the metrics file, prints its lines and publishes them, on the rank that writes it."""

    def __init__(self, total_steps: int, log_interval: int):
        self.total_steps, self.log_interval = total_steps, log_interval
        self.coverage: float | None = None
        self.step_time: float | None = None  # smoothed

    def __call__(self, record: dict) -> None:
        (self.step if "lm_loss" in record else self.evaluation)(record)
        publish(record)

    def step(self, record: dict) -> None:
        """A training step's line."""
        last, now = self.step_time, record["step_time"]
        self.step_time = now if last is None or record["phase_step"] <= 2 else 0.9 * last + 0.1 * now
        if record["phase_step"] % self.log_interval == 0 or record["phase_step"] == self.total_steps:
            say(self.line(record), sys.stdout)

    def evaluation(self, record: dict) -> None:
        """An evaluation's line."""
        self.coverage = record.get("attention_coverage", self.coverage)
        names = ("valid_lm_loss", "attention_coverage", "oracle_coverage", "exact_kl", "valid_teacher_kl")
        parts = [f"{name} {record[name]:.4f}" for name in names if record.get(name) is not None]
        say(f"evaluation at step {record['step']} {record['phase']} | {' | '.join(parts)}", sys.stdout)

    def line(self, record: dict) -> str:
        """Step, phase, losses, coverage, speed, memory and the time that this phase still takes."""
        left = (self.total_steps - record["phase_step"]) * (self.step_time or 0.0)
        parts = [
            f"step {record['step']}",
            f"{record['phase']} {record['phase_step']}/{self.total_steps}",
            _figure("loss", record["lm_loss"], ".4f"),
            _figure("KD", record["kd_loss"], ".4f") if record["kd_loss"] else None,
            _figure("teacher KL", record["teacher_kl"], ".4f") if record.get("teacher_kl") else None,
            _figure("coverage", self.coverage, ".3f") if self.coverage is not None else None,
            _figure("grad norm", record["grad_norm"], ".3f"),
            f"{record['tokens_per_second']:,.0f} tokens/s",
            f"MFU {record['mfu']:.1%}" if record.get("mfu") is not None else None,
            f"{record['peak_memory_bytes'] / 2**30:.1f} GiB" if record["peak_memory_bytes"] else None,
            f"{datetime.timedelta(seconds=round(left))} left",
        ]
        return " | ".join(part for part in parts if part)


def _figure(name: str, value: float | None, form: str) -> str:
    return f"{name} none" if value is None else f"{name} {float(value):{form}}"


def publish(record: dict) -> None:
    """What Megatron does not know of a line to its writers, under the step of the whole run."""
    figures = {
        f"clsa/{name}": float(value)
        for name, value in record.items()
        if name not in PLACES and value is not None and not isinstance(value, str)
    }
    if writer := get_tensorboard_writer():
        for name, value in figures.items():
            writer.add_scalar(name, value, record["step"])
    if wandb := get_wandb_writer():
        wandb.log(figures | {"clsa/step": record["step"]}, record["phase_step"])


def place_writers(args: Namespace, phase_folder: str, out: str) -> None:
    """Give each phase its own TensorBoard folder, wandb run and trace: Megatron counts its steps from 1."""
    if args.profile:
        args.use_pytorch_profiler = True
        args.tensorboard_dir = args.tensorboard_dir or f"{out}/tensorboard"
    if args.tensorboard_dir:
        args.tensorboard_dir = f"{args.tensorboard_dir}/{phase_folder}/log"  # the trace goes beside it
    if args.wandb_project:
        args.wandb_exp_name = "-".join(filter(None, [args.wandb_exp_name, phase_folder]))
        args.wandb_save_dir = args.wandb_save_dir or f"{out}/wandb"
        if args.rank == args.world_size - 1:  # Megatron's rank for wandb
            os.environ["WANDB_RUN_ID"] = _wandb_id(Path(args.wandb_save_dir) / f"{phase_folder}.id")
            os.environ["WANDB_RESUME"] = "allow"


def _wandb_id(file: Path) -> str:
    """The phase's own, kept beside what wandb writes: after a requeue it goes on in the same wandb run."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(secrets.token_hex(8))
    return file.read_text()


def close_writers() -> None:
    """Flush and end what `place_writers` placed."""
    if writer := get_tensorboard_writer():
        writer.close()
    if wandb := get_wandb_writer():
        wandb.finish()
