"""The range of every number that a run takes: Megatron checks few of them, and most of those late.

Owns single flags; checks of flags against each other are in validation.py, a model's own in config.py.
"""

import math

from megatron_clsa.errors import UserError

POSITIVE = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "vocab_size", "seq_length", "max_position_embeddings", "micro_batch_size", "global_batch_size",
    "train_iters", "lr", "tensor_model_parallel_size", "pipeline_model_parallel_size",
    "context_parallel_size", "save_interval", "eval_interval", "log_interval", "keep_last", "keep_every",
    "exit_interval", "exit_duration_in_mins", "eval_iters", "spike_factor", "peak_tflops",
    "assumed_efficiency", "adam_eps", "recompute_num_layers",
)  # fmt: skip
NOT_NEGATIVE = (
    "min_lr", "weight_decay", "clip_grad", "lr_warmup_iters", "num_workers", "seed",
    "hang_timeout", "max_bad_steps", "straggler_factor", "profile_step_start",
)  # fmt: skip
SHARES = ("adam_beta1", "adam_beta2")


def check_ranges(args) -> None:
    """Refuse a number outside its range, or one that is none.

    Raises:
        UserError: naming the flag.
    """
    for names, allowed, wanted in (
        (POSITIVE, lambda value: value > 0, "a positive number"),
        (NOT_NEGATIVE, lambda value: value >= 0, "0 or more"),
        (SHARES, lambda value: 0 <= value < 1, "0 or more and less than 1"),
    ):
        for name in names:
            value = getattr(args, name, None)
            if isinstance(value, int | float) and not (math.isfinite(value) and allowed(value)):
                raise UserError(f"--{name.replace('_', '-')} {value}: give {wanted}")
