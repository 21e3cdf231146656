"""Peak memory of one rank, by part, in bytes.

Owns what autograd keeps of each layer, and the two moments that can be the peak: the loss, and the backward
pass of one layer. Fragmentation, NCCL's buffers and the CUDA context come on top. Letters: T rows of a
microbatch on this rank, e bytes of an element, H hidden, F FFN, h query heads, g KV heads, d head dim.
"""

from megatron_clsa.estimate import parameters
from megatron_clsa.estimate.shape import RunShape, Stage

WORKSPACE = 64 << 20  # cuBLAS and the optimizer's scalars
USABLE = 72 << 30  # of an 80 GB GPU, the CUDA context, NCCL and fragmentation left out


def norm(run: RunShape) -> float:
    """Bytes an element that a norm and the linear after it keep: its input (local: widened) and output."""
    return (4 if run.backend == "local" else run.dtype_bytes) + run.dtype_bytes


def head_norm(run: RunShape, enabled: bool) -> float:
    """Bytes an element that a norm per head keeps of its input; its output is kept by attention."""
    return (4 if run.backend == "local" else run.dtype_bytes) * enabled


def mlp(run: RunShape) -> float:
    """Norm, fc1's output (gate and up), fc2's input."""
    c, rows = run.config, run.rows / run.tp
    fused = c.bias_activation_fusion or not c.gated_linear_unit
    wide = (3 if fused else 5) if c.gated_linear_unit else 2
    return rows * (c.hidden_size * norm(run) + wide * c.ffn_hidden_size * run.dtype_bytes)


def attention_output(run: RunShape) -> int:
    """How often attention's output is kept: kernels give `[b, s, ..]`, the projection wants `[s, b, ..]`."""
    return 1 if run.micro_batch == 1 else 2


def self_layer(run: RunShape) -> float:
    """Norm; query and key before their norms; query, key, value and output of attention, and its LSE."""
    c, rows, e = run.config, run.rows / run.tp, run.dtype_bytes
    heads, groups = c.num_attention_heads * c.kv_channels, c.num_query_groups * c.kv_channels
    before = (heads + groups) * head_norm(run, c.qk_layernorm)
    attention = ((1 + attention_output(run)) * heads + 2 * groups) * e + 4 * c.num_attention_heads
    return rows * (c.hidden_size * norm(run) + before + attention) + mlp(run)


def cross_layer(run: RunShape) -> float:
    """Norm; query and output of attention, and its LSE. Keys and values are the memory's."""
    c, rows, e = run.config, run.rows / run.tp, run.dtype_bytes
    heads = c.num_attention_heads * c.kv_channels
    before = heads * head_norm(run, c.cross_qk_norm)
    attention = (1 + attention_output(run)) * heads * e + 4 * c.num_attention_heads
    return rows * (c.hidden_size * norm(run) + before + attention) + mlp(run)


def frozen_cross_layer(run: RunShape) -> float:
    """What the distillation loss keeps of a layer that does not train: its query and LSE."""
    c = run.config
    heads = c.num_attention_heads
    return run.rows / run.tp * heads * (c.kv_channels * run.dtype_bytes + 4)


def shared_memory(run: RunShape, stage: Stage) -> float:
    """K, V of all positions, Q_idx and K_idx, the index; where the memory is made, also its norm's input."""
    c, e = run.config, run.dtype_bytes
    keys = run.rows * run.cp
    size = keys * 2 * c.num_query_groups * c.kv_channels * e / run.tp
    if c.needs_index_projection:
        size += (run.rows + keys) * c.index_head_dim * e
    if c.cross_attention == "sparse":
        size += run.rows * c.index_topk * 4 * (1 + (1 / run.tp if run.tp > 1 else 0))
    if stage.holds_memory:
        size += run.rows / run.tp * _made_of(run)
    return size


def _made_of(run: RunShape) -> float:
    """Bytes a row that making the memory keeps: the norm, and the input of norms per head."""
    c = run.config
    index = 2 * c.index_head_dim * head_norm(run, c.index_qk_norm) if c.needs_index_projection else 0
    if c.trainable == "indexer":
        return index + c.hidden_size * run.dtype_bytes
    return (
        index
        + c.hidden_size * norm(run)
        + c.num_query_groups * c.kv_channels * head_norm(run, c.cross_qk_norm)
    )


def layers(run: RunShape, stage: Stage) -> float:
    """Activations of one microbatch in the layers of one stage."""
    c = run.config
    if c.trainable == "indexer":
        return stage.cross_layers * frozen_cross_layer(run)
    kept = checkpoint = 0.0
    for count, size in ((stage.self_layers, self_layer(run)), (stage.cross_layers, cross_layer(run))):
        again = recomputed(run, count)
        kept += (count - again) * size
        group = 1 if c.recompute_method == "block" else c.recompute_num_layers or 1
        checkpoint += -(-again // group) * run.rows / run.tp * c.hidden_size * run.dtype_bytes
    return kept + checkpoint


def recomputed(run: RunShape, count: int) -> int:
    """How many of `count` layers run again in backward."""
    c = run.config
    if c.recompute_granularity != "full":
        return 0
    return min(count, c.recompute_num_layers or 1) if c.recompute_method == "block" else count


def activations(run: RunShape, stage: Stage) -> dict[str, float]:
    """All microbatches in flight, the memory and the packet that came over the pipeline link included."""
    flight = run.in_flight(stage.rank)
    parts = {"layers": flight * layers(run, stage)}
    if stage.last and run.config.trainable != "indexer":
        parts["layers"] += run.rows / run.tp * run.config.hidden_size * norm(run)  # the final norm
    if stage.cross_layers:
        parts["memory, index"] = flight * shared_memory(run, stage)
    if run.pp > 1:
        parts["packets"] = flight * (packet(run, after_memory=bool(stage.cross_layers)) * run.rows / run.tp)
    return parts


def packet(run: RunShape, after_memory: bool) -> int:
    """Bytes a row of the tensor that crosses a pipeline link."""
    c, e = run.config, run.dtype_bytes
    words = 4 // e
    width = c.hidden_size + words
    if after_memory:
        width += 1 + words + 2 * c.num_query_groups * c.kv_channels
        width += 2 * c.index_head_dim * c.needs_index_projection
        width += c.index_topk * words * (c.cross_attention == "sparse")
    return width * e


def logits(run: RunShape) -> float:
    """The output layer at the loss: logits and their fp32 softmax, or their gradient and the weight's."""
    local, e = run.vocab_size / run.tp, run.dtype_bytes
    wide = 4 if e < 4 else 0  # fp32 logits become the softmax in place
    trains = run.config.trainable != "indexer"
    backward = local * e * (run.rows + run.config.hidden_size) + run.rows * run.config.hidden_size * e
    return max(run.rows * local * (e + wide), backward if trains else 0.0)


def one_layer(run: RunShape) -> float:
    """The backward pass of one layer: what it ran again, and the gradients of its widest tensors."""
    c, rows, e = run.config, run.rows / run.tp, run.dtype_bytes
    if c.trainable == "indexer":
        return 0.0
    group = 1 if c.recompute_method == "block" else c.recompute_num_layers or 1
    again = group * max(self_layer(run), cross_layer(run)) if c.recompute_granularity == "full" else 0.0
    return again + rows * e * (3 * c.ffn_hidden_size + 2 * c.hidden_size)


def static(run: RunShape, stage: Stage) -> dict[str, float]:
    """Weights, the gradient buffer and the distributed optimizer's shard."""
    backbone, index = parameters.of_stage(run, stage)
    weights = (backbone + index).on_rank(run.tp)
    trained = parameters.trainable(run, stage).on_rank(run.tp)
    state = 12 if run.dtype_bytes < 4 else 8  # Adam's two moments, and fp32 weights beside 16-bit ones
    return {
        "weights": weights * run.dtype_bytes,
        "gradients": trained * run.gradient_bytes,
        "optimizer": trained * state / (run.dp * run.cp),
    }


def of_stage(run: RunShape, rank: int) -> dict[str, float]:
    """Every part of the peak of a rank of pipeline stage `rank`; their sum is the peak."""
    stage = run.stage(rank)
    at_loss = logits(run) if stage.last else 0.0
    parts = static(run, stage) | activations(run, stage)
    layer = one_layer(run)
    parts["logits" if at_loss > layer else "backward of a layer"] = max(at_loss, layer)
    return parts | {"workspace": WORKSPACE}


def peak(run: RunShape) -> float:
    """The fullest rank's."""
    return max(sum(of_stage(run, rank).values()) for rank in range(run.pp))
