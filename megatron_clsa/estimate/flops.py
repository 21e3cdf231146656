"""Floating-point operations of one training step, by part. A multiply-add counts as two.

Owns model FLOPs: what the step has to compute, without activation recompute and with one document a
sequence (packed documents need less). Backward counts twice the forward; a frozen backbone has none. Top-k
selection, softmax and norms are not counted.
"""

from megatron_clsa.estimate import parameters
from megatron_clsa.estimate.shape import RunShape


def pairs(seq_length: int, most: int) -> int:
    """Visible (query, key) pairs of a causal sequence in which a query sees at most `most` keys."""
    most = min(most, seq_length)
    return most * (most + 1) // 2 + (seq_length - most) * most


def index_projection(run: RunShape) -> float:
    """Q_idx and K_idx of one sequence."""
    return 4.0 * run.seq_length * run.config.index_head_dim * run.config.hidden_size


def forward(run: RunShape) -> dict[str, float]:
    """One sequence through the model."""
    c, n = run.config, run.seq_length
    heads = c.num_attention_heads * c.kv_channels
    whole, sparse = pairs(n, n), c.cross_attention == "sparse"
    part = {name: 2.0 * n * weights.split for name, weights in parameters.by_part(run).items()}
    attended = pairs(n, c.index_topk) if sparse else whole
    index = index_projection(run) * c.needs_index_projection + 2.0 * whole * c.index_head_dim * sparse
    return {
        "self-decoder matrices": part["self-decoder"],
        "window attention": 4.0 * heads * pairs(n, c.sliding_window) * c.num_self_decoder_layers,
        "memory": part["memory"],
        "index": index,
        "cross-decoder matrices": part["cross-decoder"],
        "cross attention": 4.0 * heads * attended * c.num_cross_decoder_layers,
        "output layer": 2.0 * n * run.vocab_size * c.hidden_size,
    }


def distillation(run: RunShape) -> float:
    """Forward and backward of the distillation loss of one sequence.

    Scores of every head and layer once more, the index's logits, and the gradient of Q_idx and K_idx.
    """
    c, n = run.config, run.seq_length
    if c.kd_loss == "off":
        return 0.0
    compared = pairs(n, n if c.kd_loss == "full" else c.index_topk)
    heads = c.num_attention_heads * c.kv_channels
    target = 2.0 * compared * heads
    index = 2.0 * compared * c.index_head_dim
    dense_again = 4.0 * pairs(n, n) * heads if c.kd_loss == "full" and c.cross_attention == "sparse" else 0.0
    # Forward: target and logits. Backward: both again, then dQ_idx and dK_idx.
    return c.num_cross_decoder_layers * (2 * target + 4 * index + dense_again)


def of_step(run: RunShape) -> dict[str, float]:
    """All of a step, over all ranks, by part."""
    once = forward(run)
    backward = 0.0 if run.config.trainable == "indexer" else 2.0
    step = {name: flops * (1 + backward) for name, flops in once.items()}
    c = run.config
    if c.needs_index_projection:
        # Selection has no gradient; the projections have the weights', and their input's if it trains.
        ends_here = c.trainable == "indexer" or c.indexer_detach_input
        step["index"] = once["index"] + (c.kd_loss != "off") * (1 if ends_here else 2) * index_projection(run)
    step["distillation"] = distillation(run)
    return {name: flops * run.global_batch for name, flops in step.items() if flops}


def total(run: RunShape) -> float:
    return sum(of_step(run).values())
