"""How long a step should take, from its FLOPs, its bytes and what is assumed of the machine.

Owns the assumptions, each a named number, and one formula. Nothing overlaps in it: it errs to the slow side.

    seconds = FLOPs / (ranks * peak * efficiency) / (1 - bubble) + bytes / bandwidth, summed over the links
    bubble  = (pp - 1) / (microbatches * chunks + pp - 1)
"""

from dataclasses import dataclass

from megatron_clsa.estimate import flops, links, memory
from megatron_clsa.estimate.shape import RunShape

# Dense 16-bit matrix products, TFLOP/s, of the vendors' data sheets.
PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "GH200": 989, "B200": 2250, "GB200": 2500}


@dataclass(frozen=True)
class Machine:
    """What is assumed.

    Attributes:
        peak_tflops: of one GPU.
        efficiency: share of it that kernels reach while they run.
        inside, between: bytes/s a GPU receives inside a node and between nodes.
        gpus_per_node: ranks that share the fast link; TP varies fastest over ranks, then CP, DP, PP.
    """

    peak_tflops: float = 989
    efficiency: float = 0.5
    inside: float = 350e9
    between: float = 45e9
    gpus_per_node: int = 8


@dataclass(frozen=True)
class Prediction:
    """Attributes: seconds of a step; mfu: model FLOPs over peak; tokens_per_second of the whole run."""

    seconds: float
    mfu: float
    tokens_per_second: float


def bandwidths(run: RunShape, machine: Machine) -> dict[str, float]:
    """Bytes/s of each link: the fast one while the groups up to it fit into a node."""
    reach, speed = 1, {}
    for link, size in (("TP", run.tp), ("CP", run.cp), ("DP", run.dp), ("PP", run.pp)):
        reach *= size
        speed[link] = machine.inside if reach <= machine.gpus_per_node else machine.between
    return speed


def recompute_flops(run: RunShape) -> float:
    """The forward pass of the layers that run again in backward."""
    if run.config.recompute_granularity != "full" or run.config.trainable == "indexer":
        return 0.0
    c, once = run.config, flops.forward(run)
    again = sum(memory.recomputed(run, count) for rank in range(run.pp) for count in _layers(run, rank))
    layers = sum(
        once[name]
        for name in (
            "self-decoder matrices",
            "window attention",
            "cross-decoder matrices",
            "cross attention",
        )
    )
    return layers * again / c.num_layers * run.global_batch


def _layers(run: RunShape, rank: int) -> tuple[int, int]:
    stage = run.stage(rank)
    return stage.self_layers, stage.cross_layers


def predict(run: RunShape, machine: Machine) -> Prediction:
    """A step's time, and what follows from it."""
    model = flops.total(run)
    peak = run.ranks * machine.peak_tflops * 1e12
    bubble = (run.pp - 1) / (run.microbatches * run.chunks + run.pp - 1)
    compute = (model + recompute_flops(run)) / (peak * machine.efficiency) / (1 - bubble)
    speed = bandwidths(run, machine)
    seconds = compute + sum(size / speed[link] for link, size in links.of_step(run).items())
    return Prediction(seconds, model / (seconds * peak), run.tokens / seconds)


def peak_tflops_of(device_name: str) -> float | None:
    """The data sheet's figure for a GPU by its name, None if the table lacks it."""
    words = device_name.upper().replace("-", " ").split()
    return next((float(PEAK_TFLOPS[word]) for word in words if word in PEAK_TFLOPS), None)
