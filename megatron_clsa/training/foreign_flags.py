"""Flags of Megatron that a CLSA run cannot honour: refused, where upstream's parser would take them.

Owns the lists. Without them nobody would read such a flag, and the run would not be the one asked for.
"""

import argparse

from megatron_clsa.errors import UserError

# Phases decide these, so that a run can be stopped and resumed anywhere.
DECIDED_BY_RUN = {
    "save": "--out",
    "save_retain_interval": "--keep-last and --keep-every",
    "ckpt_step": "--out, whose newest sound checkpoint is taken",
    "use_checkpoint_args": "--config",
    "full_validation": "--eval-iters",
    "multiple_validation_sets": "--eval-iters",
    "data_parallel_random_init": "--seed, of which every layout makes the same weights",
    "load": "--out, or --pretrained-checkpoint for the first phase's weights",
    "finetune": "--pretrained-checkpoint",
    "train_samples": "--train-iters",
    "rampup_batch_size": "--global-batch-size",
    "yaml_cfg": "--config",
    "non_persistent_save_interval": "--save-interval",
    "no_save_optim": "the default, or it could not go on",
    "no_save_rng": "the default, or it could not go on",
    "no_load_optim": "--pretrained-checkpoint, which takes weights alone",
    "no_load_rng": "the default, or it would not go on bitwise",
    "log_straggler": "--straggler-factor (Megatron's detector has to be called from its own script)",
}
# Another model than model/ builds and convert/ exports, or another way to hold or train it than was tried.
NOT_CLSA = (
    "activation_func_clamp_value",
    "apply_query_key_layer_scaling",
    "apply_residual_connection_post_layernorm",
    "attention_backend",
    "attention_dropout",
    "attention_output_gate",
    "ckpt_format",
    "cp_comm_type",
    "cpu_offloading_num_layers",
    "experimental_attention_variant",
    "fp32_residual_connection",
    "glu_linear_offset",
    "heterogeneous_layers_config_encoded_json",
    "heterogeneous_layers_config_path",
    "hybrid_context_parallel",
    "hybrid_layer_pattern",
    "init_method_xavier_uniform",
    "is_hybrid_model",
    "layernorm_zero_centered_gamma",
    "linear_attention_freq",
    "mtp_num_layers",
    "multi_latent_attention",
    "no_rope_freq",
    "normalization",
    "openai_gelu",
    "optimizer",
    "position_embedding_type",
    "qk_clip",
    "qk_l2_norm",
    "quick_geglu",
    "reset_attention_mask",
    "rotary_interleaved",
    "rotary_percent",
    "rotary_seq_len_interpolation_factor",
    "sft",
    "softmax_type",
    "spec",
    "squared_relu",
    "test_mode",
    "use_flash_attn",
    "use_kitchen_attention",
    "use_megatron_fsdp",
    "use_mup",
    "use_rope_scaling",
    "use_torch_fsdp2",
    "window_attn_skip_freq",
)
# An fp16 loss scale finds its size by overflowing, which the guards take for a fault.
INSTEAD = {
    "window_size": "--sliding-window",
    "fp16": "--bf16",
    "skip_train": "tools/evaluate.py",
}


def refuse_foreign_flags(args, parser: argparse.ArgumentParser, house: dict, sources: list) -> None:
    """Refuse any value but the house's own, or the parser's default where the house has none.

    Args:
        args: everything that was parsed, recipe and command line.
        house: flag name with underscores -> the value that every CLSA run has.
        sources: (file, its settings), for the message; what no file sets is from the command line.
    Raises:
        UserError: naming the flag, its value and what to do.
    """
    for name in (*DECIDED_BY_RUN, *INSTEAD, *NOT_CLSA):
        value, wanted = getattr(args, name), house.get(name, parser.get_default(name))
        if value == wanted:
            continue
        flag = next(action.option_strings[0] for action in parser._actions if action.dest == name)
        key = flag[2:].replace("-", "_")
        where = next((path for path, settings in sources if key in settings), "command line")
        flag = f"{where}: {flag}" + ("" if value is True else f" {_shown(value)}")
        if name in DECIDED_BY_RUN:
            raise UserError(f"{flag}: {key} is decided by the run; use {DECIDED_BY_RUN[name]}")
        if name in INSTEAD:
            raise UserError(f"{flag}: not CLSA's flag; use {INSTEAD[name]}")
        has = "" if wanted in (None, False) else f", which has {_shown(wanted)}"
        raise UserError(f"{flag}: not part of CLSA{has}; drop it")


def _shown(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
