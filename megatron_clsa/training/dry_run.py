"""`--dry-run`: what each phase would cost on each rank, printed; starts nothing and needs no data.

Owns the printing and the way from parsed flags to a `RunShape`. The formulas: megatron_clsa/estimate.
"""

from argparse import Namespace

import torch

from megatron_clsa.config import CLSAConfig
from megatron_clsa.estimate import flops, links, memory, parameters
from megatron_clsa.estimate.shape import RunShape
from megatron_clsa.estimate.speed import Machine, Prediction, peak_tflops_of, predict
from megatron_clsa.training.plan import PhaseRun, RunPlan, make_plan
from megatron_clsa.training.recipe import Recipe

GIB = 2.0**30


def dry_run(recipe: Recipe, command: Namespace, words: list[str]) -> int:
    """Print the plan of every chosen phase. Returns the exit code."""
    ranks = command.dry_run or int(command.nproc_per_node or 0) or None
    plan = make_plan(recipe, command, words, ranks)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = command.peak_tflops or peak_tflops_of(device) or Machine.peak_tflops
    if plan.runs[0].args.rank == 0:
        print_plan(plan, Machine(peak, command.assumed_efficiency))
    return 0


def run_shape(args: Namespace, config: CLSAConfig) -> RunShape:
    """The sizes of a phase from its validated flags."""
    half = args.bf16 or args.fp16
    return RunShape(
        config=config,
        vocab_size=args.padded_vocab_size,
        seq_length=args.seq_length,
        micro_batch=args.micro_batch_size,
        global_batch=args.global_batch_size,
        ranks=args.world_size,
        tied=not args.untie_embeddings_and_output_weights,
        dtype_bytes=2 if half else 4,
        gradient_bytes=2 if half and not args.accumulate_allreduce_grads_in_fp32 else 4,
        backend=args.transformer_impl,
    )


def print_plan(plan: RunPlan, machine: Machine) -> None:
    """Every phase that is to be run."""
    days = 0.0
    for number, run in enumerate(plan.runs):
        shape = run_shape(run.args, run.config)
        prediction = predict(shape, machine)
        days += prediction.seconds * run.steps / 86400
        if number == 0:
            _print_head(shape, machine)
        _print_phase(run, shape, prediction)
    print(f"\nall phases: {days:,.2f} days")


def _print_head(shape: RunShape, machine: Machine) -> None:
    parts = parameters.by_part(shape)
    print(f"parameters: {parameters.total(shape):,}")
    for name, part in parts.items():
        if part.total:
            print(f"  {name:<16}{part.total:>20,}")
    print(
        f"assumed: {machine.peak_tflops:.0f} TFLOP/s a GPU, {machine.efficiency:.0%} of it reached, links "
        f"{machine.inside / 1e9:.0f} GB/s inside {machine.gpus_per_node} GPUs and {machine.between / 1e9:.0f} "
        f"between, nothing overlapped; layers: {shape.backend}"
    )


def _print_phase(run: PhaseRun, shape: RunShape, prediction: Prediction) -> None:
    tokens = run.steps * shape.tokens
    print(
        f"\nphase {run.phase.number} {run.phase.name}: {shape.global_batch} x {shape.seq_length} tokens a step, "
        f"{run.steps:,} steps, {tokens / 1e9:,.2f} B tokens; {shape.ranks} ranks = TP {shape.tp} x PP {shape.pp} "
        f"x CP {shape.cp} x DP {shape.dp}, {shape.microbatches} microbatches"
    )
    _print_memory(shape)
    step = flops.of_step(shape)
    total = sum(step.values())
    parts = ", ".join(f"{name} {value / total:.1%}" for name, value in step.items())
    print(f"  FLOPs a step: {total:.4g} ({parts})")
    received = ", ".join(f"{link} {size / GIB:,.3f}" for link, size in links.of_step(shape).items())
    print(f"  GiB a rank receives a step: {received}")
    print(
        f"  predicted: {prediction.seconds:.3g} s a step, {prediction.tokens_per_second:,.0f} tokens/s, "
        f"MFU {prediction.mfu:.1%}, {prediction.seconds * run.steps / 86400:,.2f} days"
    )


def _print_memory(shape: RunShape) -> None:
    stages = [memory.of_stage(shape, rank) for rank in range(shape.pp)]
    fullest = max(range(shape.pp), key=lambda rank: sum(stages[rank].values()))
    parts = ", ".join(f"{name} {size / GIB:,.2f}" for name, size in stages[fullest].items())
    by_rank = " ".join(f"{sum(stage.values()) / GIB:,.2f}" for stage in stages)
    print(f"  GiB a rank, stage {fullest}: {parts}")
    print(f"  peak GiB by pipeline stage: {by_rank}")
