"""Bytes that a rank receives over each link in one training step.

Owns the count of transfers; what they carry is drawn in docs/parallel.md. Forward and backward, without what
activation recompute sends again. A gather or reduce-scatter of S bytes over n ranks receives S (n-1)/n, an
all-reduce twice that.
"""

from megatron_clsa.estimate import memory, parameters
from megatron_clsa.estimate.shape import RunShape, Stage


def _others(size: int) -> float:
    """Share of a gathered tensor that comes from other ranks."""
    return (size - 1) / size


def tensor(run: RunShape, stage: Stage) -> float:
    """TP with sequence parallelism, one microbatch.

    A column- and a row-parallel linear: gather and reduce-scatter forward; backward a gather for the output's
    gradient, one of the input for the weight's, and a reduce-scatter. A frozen model has no backward.
    """
    if run.tp == 1:
        return 0.0
    c, e = run.config, run.dtype_bytes
    frozen = c.trainable == "indexer"
    hidden = run.rows * c.hidden_size * e
    count = (2 if frozen else 5) * 2 * (stage.self_layers + stage.cross_layers)
    if stage.first:
        count += 1 if frozen else 2
    if stage.holds_memory:
        count += 1 if frozen else 3
    size = count * hidden
    if stage.last:
        size += hidden * (1 if frozen else 3)
        size += 2 * 3 * run.rows * 4  # maximum, target logit and sum of the loss, all-reduced
    if stage.cross_layers:
        size += _index_rows(run)
    return size * _others(run.tp)


def _index_rows(run: RunShape) -> float:
    """Q_idx and K_idx gathered (their gradient scattered), and the index."""
    c = run.config
    rows = run.rows * 2 * c.index_head_dim * run.dtype_bytes if c.needs_index_projection else 0.0
    gradient = c.kd_loss != "off"
    index = run.rows * c.index_topk * 4 if c.cross_attention == "sparse" else 0.0
    return rows * (2 if gradient else 1) + index


def replicated_gradients(run: RunShape, stage: Stage) -> float:
    """Once a step: gradients of norms and indexer summed over TP ranks."""
    return 2 * parameters.trainable(run, stage).replicated * run.gradient_bytes * _others(run.tp)


def context(run: RunShape, stage: Stage) -> float:
    """CP, one microbatch: the memory once a stage, once a window layer its halo (or all keys)."""
    if run.cp == 1:
        return 0.0
    c, e = run.config, run.dtype_bytes
    both = 1 if c.trainable == "indexer" else 2
    kv = 2 * c.num_query_groups * c.kv_channels * e / run.tp
    keys = run.rows * run.cp
    halo = c.sliding_window - 1
    if halo <= run.seq_length // (2 * run.cp):
        neighbours = min(2, run.cp - 1)  # of a rank inside the line; those at its ends have one
        windows = neighbours * halo * run.micro_batch * kv
    else:
        windows = keys * kv * _others(run.cp)
    size = stage.self_layers * windows * both
    if stage.cross_layers:
        index = c.index_head_dim * e if c.needs_index_projection else 0
        backward = 2 if c.trainable != "indexer" or c.kd_loss != "off" else 1
        size += keys * (kv + index) * _others(run.cp) * backward
    return size


def pipeline(run: RunShape, stage: Stage) -> float:
    """PP, one microbatch: a packet from the stage before, and the gradient of one from the stage after."""
    if run.pp == 1:
        return 0.0
    rows = run.rows / run.tp
    received = 0.0
    for chunk_before, chunk_after in _cuts(run, stage):
        received += rows * sum(
            memory.packet(run, after) for after in (chunk_before, chunk_after) if after is not None
        )
    return received


def _cuts(run: RunShape, stage: Stage) -> list[tuple[bool | None, bool | None]]:
    """For each model chunk: whether the cut before it and the one after it lie behind the memory."""
    half, cuts = run.config.num_self_decoder_layers, []
    for first, count in run.chunk_layers(stage.rank):
        before = None if first == 0 else first > half
        end = first + count
        cuts.append((before, None if end == run.config.num_layers else end > half))
    return cuts


def data(run: RunShape, stage: Stage) -> float:
    """DP, once a step: gradients reduce-scattered, weights gathered, over replicas and CP ranks."""
    size = run.dp * run.cp
    trained = parameters.trainable(run, stage).on_rank(run.tp)
    return trained * (run.gradient_bytes + run.dtype_bytes) * _others(size)


def of_stage(run: RunShape, rank: int) -> dict[str, float]:
    """Bytes that a rank of pipeline stage `rank` receives in one step, by link."""
    stage = run.stage(rank)
    return {
        "TP": run.microbatches * tensor(run, stage) + replicated_gradients(run, stage),
        "CP": run.microbatches * context(run, stage),
        "PP": run.microbatches * pipeline(run, stage),
        "DP": data(run, stage),
    }


def of_step(run: RunShape) -> dict[str, float]:
    """The busiest rank's bytes, by link."""
    stages = [of_stage(run, rank) for rank in range(run.pp)]
    return {link: max(stage[link] for stage in stages) for link in stages[0]}
