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
    print(f"parameters {parameters.total(shape):,}")
    for name, part in parameters.by_part(shape).items():
        if part.total:
            print(f"  {name:<24}{part.total:>20,}")
    print(
        f"assumed: {machine.peak_tflops:.0f} TFLOP/s a GPU of which a step reaches {machine.efficiency:.0%}, "
        "sparse attention of a random index aside; "
        f"{machine.inside / 1e9:.0f} GB/s inside {machine.gpus_per_node} GPUs, "
        f"{machine.between / 1e9:.0f} GB/s beyond; no overlap; {shape.backend} layers"
    )


def _print_phase(run: PhaseRun, shape: RunShape, prediction: Prediction) -> None:
    tokens = run.steps * shape.tokens
    print(
        f"\nphase {run.phase.number} {run.phase.name}: {run.steps:,} steps of {shape.global_batch} x "
        f"{shape.seq_length} tokens, {_count(tokens)} tokens\n"
        f"  {shape.ranks} ranks = TP {shape.tp} x PP {shape.pp} x CP {shape.cp} x DP {shape.dp}, "
        f"{shape.microbatches} microbatches of {shape.micro_batch}"
    )
    _print_memory(shape)
    _print_parts("FLOPs a step", flops.of_step(shape), _count)
    _print_parts("received by a rank a step", links.of_step(shape), _size)
    print(
        f"  predicted: {prediction.seconds:.3g} s a step, {prediction.tokens_per_second:,.0f} tokens/s, "
        f"MFU {prediction.mfu:.1%}, {prediction.seconds * run.steps / 86400:,.2f} days"
    )


def _print_memory(shape: RunShape) -> None:
    """The fullest rank by part, then the peak of every pipeline stage."""
    stages = [memory.of_stage(shape, rank) for rank in range(shape.pp)]
    peaks = [sum(stage.values()) for stage in stages]
    fullest = peaks.index(max(peaks))
    _print_parts(f"memory of a rank of stage {fullest}", stages[fullest], _size)
    if shape.pp > 1:
        print(f"  peak by pipeline stage: {', '.join(map(_size, peaks))}")
    if max(peaks) > memory.USABLE:
        print(
            f"  TOO MUCH for a GPU of 80 GB, which has about {_size(memory.USABLE)} to give: raise "
            "--tensor-model-parallel-size or --context-parallel-size, or recompute activations"
        )


def _print_parts(title: str, parts: dict[str, float], unit) -> None:
    listed = ", ".join(f"{name} {unit(value)}" for name, value in parts.items() if value)
    print(f"  {title}: {unit(sum(parts.values()))} ({listed or 'none'})")


def _size(value: float) -> str:
    return f"{value / 2**30:,.2f} GiB" if value >= 2**28 else f"{value / 2**20:,.2f} MiB"


def _count(value: float) -> str:
    for power, letter in ((15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if value >= 10**power:
            return f"{value / 10**power:,.2f} {letter}"
    return f"{value:,.0f}"
