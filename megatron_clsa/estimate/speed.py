"""How long a step should take, from its FLOPs, its bytes and what is assumed of the machine.

Owns the assumptions, each a named number, and one formula. Nothing overlaps in it, the index is random (a
trained one costs less), and the host keeps up with the GPU, which it does not where kernels are small.

    seconds = (FLOPs / (peak * efficiency) + sparse) / ranks / (1 - bubble) + bytes / bandwidth of each link
    bubble  = (pp - 1) / (microbatches * chunks + pp - 1)

`sparse` is the time of sparse attention, whose kernels execute whole tiles; FLOPs leave it out.
"""

from dataclasses import dataclass

from megatron_clsa.estimate import flops, links, memory
from megatron_clsa.estimate.shape import RunShape

# Dense 16-bit matrix products, TFLOP/s, of the vendors' data sheets.
PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "GH200": 989, "B200": 2250, "GB200": 2500}

# Nanoseconds of one key of a tile of TILE_ROWS rows x 128 dims, forward and backward, on one H100: those of
# kernels/sparse_choice.py, which is not imported, as it needs Triton.
UNION_NS, MASKED_NS, TILE_ROWS = 0.54, 0.30, 64
RATES_TFLOPS = PEAK_TFLOPS["H100"]


@dataclass(frozen=True)
class Machine:
    """What is assumed.

    Attributes:
        peak_tflops: of one GPU.
        efficiency: share of it that a step reaches, sparse attention aside. Fitted to a step of 465 ms: 4
            layers of the 4B, 8 x 8192 tokens on one H200 (docs/parallel.md; a slower host took 527).
        inside, between: bytes/s a GPU receives inside a node and between nodes.
        gpus_per_node: ranks that share the fast link; TP varies fastest over ranks, then CP, DP, PP.
    """

    peak_tflops: float = 989
    efficiency: float = 0.34
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


def sparse_attention_seconds(run: RunShape) -> float:
    """Sparse attention of a step on one GPU of RATES_TFLOPS, forward and backward (no recompute); 0 if dense.

    Of v visible keys each of a tile's T queries selects k at random, so that union tiles execute
    v (1 - (1 - k/v)^T) of them and masked tiles all. The faster kind is taken, as sparse_choice.py does.
    """
    c, samples = run.config, 64
    if c.cross_attention != "sparse":
        return 0.0
    queries = max(1, TILE_ROWS * c.num_query_groups // c.num_attention_heads)
    visible = [run.seq_length * (i + 0.5) / samples for i in range(samples)]
    union = sum(v * (1 - (1 - min(1, c.index_topk / v)) ** queries) for v in visible)
    tile_ns = min(UNION_NS * union, MASKED_NS * sum(visible)) / samples * c.kv_channels / 128
    tiles = run.seq_length / queries * c.num_query_groups * run.global_batch
    passes = 1 / 3 if c.trainable == "indexer" else 1  # backward is twice the forward
    return 1e-9 * tile_ns * tiles * c.num_cross_decoder_layers * passes


def predict(run: RunShape, machine: Machine) -> Prediction:
    """A step's time, and what follows from it."""
    parts = flops.of_step(run)
    model, peak = sum(parts.values()), machine.peak_tflops * 1e12
    elsewhere = model - (parts["cross attention"] if run.config.cross_attention == "sparse" else 0)
    compute = (elsewhere + recompute_flops(run)) / (peak * machine.efficiency)
    compute += sparse_attention_seconds(run) * RATES_TFLOPS / machine.peak_tflops
    bubble = (run.pp - 1) / (run.microbatches * run.chunks + run.pp - 1)
    speed = bandwidths(run, machine)
    seconds = compute / run.ranks / (1 - bubble)
    seconds += sum(size / speed[link] for link, size in links.of_step(run).items())
    return Prediction(seconds, model / (seconds * run.ranks * peak), run.tokens / seconds)


def peak_tflops_of(device_name: str) -> float | None:
    """The data sheet's figure for a GPU by its name, None if the table lacks it."""
    words = device_name.upper().replace("-", " ").split()
    return next((float(PEAK_TFLOPS[word]) for word in words if word in PEAK_TFLOPS), None)
