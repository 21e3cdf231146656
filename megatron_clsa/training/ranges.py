"""The range of every number that a run takes: Megatron checks few of them, and most of those late.

Owns single flags; checks of flags against each other are in validation.py, a model's own in config.py.
"""

import math

from megatron_clsa.errors import UserError

POSITIVE = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "vocab_size", "make_vocab_size_divisible_by", "seq_length", "max_position_embeddings", "init_method_std",
    "embedding_init_method_std", "layernorm_epsilon", "micro_batch_size", "global_batch_size",
    "eval_micro_batch_size", "eval_global_batch_size", "train_iters", "lr", "decoupled_lr", "lr_decay_iters",
    "lr_wsd_decay_iters", "tensor_model_parallel_size", "pipeline_model_parallel_size",
    "context_parallel_size", "num_virtual_stages_per_pipeline_rank", "save_interval", "eval_interval",
    "log_interval", "tensorboard_log_interval", "check_weight_hash_across_dp_replicas_interval",
    "train_sync_interval", "keep_last", "keep_every", "exit_interval", "exit_duration_in_mins", "eval_iters",
    "max_bad_steps", "peak_tflops", "assumed_efficiency", "adam_eps", "recompute_num_layers",
    "distributed_timeout_minutes",
)  # fmt: skip
NOT_NEGATIVE = (
    "min_lr", "decoupled_min_lr", "lr_warmup_init", "lr_warmup_iters", "weight_decay", "start_weight_decay",
    "end_weight_decay", "clip_grad", "num_workers", "hang_timeout", "profile_step_start",
    "manual_gc_interval", "dry_run",
)  # fmt: skip
ABOVE_ONE, ABOVE_ONE_OR_NONE = ("spike_factor",), ("straggler_factor",)  # times what is usual
SHARES = ("adam_beta1", "adam_beta2", "hidden_dropout", "lr_warmup_fraction")
SEEDS = ("seed",)  # numpy takes 32 bits, and Megatron adds to the seed for each pipeline stage
OTHER_FLAG = {"layernorm_epsilon": "--norm-epsilon"}  # the rest are named as their flags are


def check_ranges(args) -> None:
    """Refuse a number outside its range, or one that is none.

    Raises:
        UserError: naming the flag.
    """
    for names, allowed, wanted in (
        (POSITIVE, lambda value: value > 0, "a positive number"),
        (NOT_NEGATIVE, lambda value: value >= 0, "0 or more"),
        (ABOVE_ONE, lambda value: value > 1, "a number above 1"),
        (ABOVE_ONE_OR_NONE, lambda value: value == 0 or value > 1, "a number above 1, or 0 for no report"),
        (SHARES, lambda value: 0 <= value < 1, "0 or more and less than 1"),
        (SEEDS, lambda value: 0 <= value < 2**31, "0 or more and less than 2^31"),
    ):
        for name in names:
            value = getattr(args, name, None)
            if isinstance(value, int | float) and not (math.isfinite(value) and allowed(value)):
                raise UserError(f"{flag_of(name)} {value}: give {wanted}")


def flag_of(name: str) -> str:
    return OTHER_FLAG.get(name, "--" + name.replace("_", "-"))
