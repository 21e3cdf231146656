"""Refuses a run that cannot work, before any process group or dataset is built, identically on every rank.

Owns checks of flags against each other, the machine and the files they name. A field's own range is checked
in config.py, a recipe's shape in recipe.py; what Megatron asserts besides becomes the same one-line error.
"""

import contextlib
import io
import os
import traceback
from copy import copy
from importlib.util import find_spec
from pathlib import Path

import torch
from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.arguments import validate_args

from megatron_clsa.config import CLSAConfig
from megatron_clsa.data.tokenizer import load_tokenizer
from megatron_clsa.data.validation import validate_data_arguments
from megatron_clsa.errors import UserError
from megatron_clsa.estimate.shape import chunk_layers
from megatron_clsa.places import check_out
from megatron_clsa.training.ranges import check_ranges
from megatron_clsa.training.teacher_checks import check_teacher, check_teacher_vocabulary

REQUIRED = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "seq_length",
    "micro_batch_size",
    "train_iters",
    "lr",
)


def validate_phase(args, phase_name: str) -> CLSAConfig:
    """Check one phase's flags; completes `args` as Megatron's `validate_args` does.

    Returns:
        The model's configuration for this phase.
    """
    try:
        _check_required(args)
        check_ranges(args)
        _check_layout(args)
        _check_sequence(args)
        _check_schedule(args)
        if args.dry_run is None:
            _check_platform(args)
            _check_writers(args)
            _check_nccl_file(args)
            check_teacher(args)
            tokenizer = _load_tokenizer(args)
            check_teacher_vocabulary(args, tokenizer.vocab_size)
            _check_data(args, tokenizer)
        else:
            _set_vocabulary(args)
        return _megatron_checks(args)
    except UserError as error:
        raise UserError(f"phase {phase_name}: {error}") from error


def _check_required(args):
    for name in REQUIRED:
        if getattr(args, name) is None:
            raise UserError(f"--{_dashed(name)} is missing: set {name} in the recipe")


def _check_platform(args):
    if torch.cuda.is_available():
        _check_gpus(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count())
        return
    gpu_only = {
        f"--distributed-backend {args.distributed_backend}": args.distributed_backend == "nccl",
        f"--transformer-impl {args.transformer_impl}": args.transformer_impl != "local",
        f"--fp8-format {args.fp8}": bool(args.fp8),
        f"--cuda-graph-impl {args.cuda_graph_impl}": args.cuda_graph_impl != "none",
        "--enable-cuda-graph": args.enable_cuda_graph,
        "--external-cuda-graph": args.external_cuda_graph,
        f"--sparse-attention-kernel {args.sparse_attention_kernel}": args.sparse_attention_kernel != "auto",
        "--use-precision-aware-optimizer": args.use_precision_aware_optimizer,
        "--recompute-modules layernorm": "layernorm" in (args.recompute_modules or ()),
        "--init-model-with-meta-device": args.init_model_with_meta_device,
        "--use-nccl-ub": args.nccl_ub,
        "--use-sharp": args.use_sharp,
    }
    for flag, asked in gpu_only.items():
        if asked:
            raise UserError(f"{flag} needs a GPU and none is visible: drop the flag")


def _check_gpus(ranks: int, gpus: int):
    """On this machine; a rank needs a GPU of its own. Under srun the launch script has counted."""
    if ranks > gpus:
        raise UserError(
            f"--nproc-per-node {ranks}: {gpus} GPUs are visible here; start as many ranks at most"
        )


def _check_writers(args):
    for flag, asked, package, extra in (
        ("--tensorboard-dir", args.tensorboard_dir, "tensorboard", "tensorboard"),
        ("--wandb-project", args.wandb_project, "wandb", "wandb"),
    ):
        if asked and find_spec(package) is None:
            raise UserError(
                f"{flag} {asked} needs {package}: pip install 'megatron_clsa[{extra}]', or drop the flag"
            )
    if args.tensorboard_dir:
        check_out(Path(args.tensorboard_dir), "--tensorboard-dir")


def _check_nccl_file(args):
    path = args.nccl_communicator_config_path
    if path is not None and not Path(path).is_file():
        raise UserError(f"--nccl-communicator-config-path {path} is no file: mend the path or drop the flag")


def _check_layout(args):
    tp, pp, cp = _sizes(args)
    if args.world_size % (tp * pp * cp):
        raise UserError(
            f"{args.world_size} ranks cannot hold --tensor-model-parallel-size {tp} x "
            f"--pipeline-model-parallel-size {pp} x --context-parallel-size {cp} = {tp * pp * cp}: "
            "start a multiple of that many"
        )
    data_parallel = args.world_size // (tp * pp * cp)
    batch = args.global_batch_size or args.micro_batch_size * data_parallel
    if batch % (args.micro_batch_size * data_parallel):
        raise UserError(
            f"--global-batch-size {batch} is not a multiple of --micro-batch-size {args.micro_batch_size} x "
            f"{data_parallel} data-parallel ranks: change one of them"
        )
    uneven = args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers
    if uneven == (None, None) and not args.pipeline_model_parallel_layout and args.num_layers % pp:
        raise UserError(
            f"--num-layers {args.num_layers} does not divide over --pipeline-model-parallel-size {pp}: "
            "set --decoder-first-pipeline-num-layers or --pipeline-model-parallel-layout"
        )
    heads, groups = args.num_attention_heads, args.num_query_groups or args.num_attention_heads
    if heads % groups:
        raise UserError(
            f"--num-query-groups {groups} does not divide --num-attention-heads {heads}: change one"
        )
    for flag, count in (("--num-attention-heads", heads), ("--num-query-groups", groups)):
        if count % tp:
            raise UserError(f"{flag} {count} is not divisible by --tensor-model-parallel-size {tp}: lower it")
    if args.kv_channels is None and args.hidden_size % heads:
        raise UserError(
            f"--hidden-size {args.hidden_size} is not a multiple of --num-attention-heads {heads}: "
            "change one, or set --kv-channels"
        )


def _check_schedule(args):
    if args.keep_every is not None and args.keep_last is None:
        raise UserError(f"--keep-every {args.keep_every} means nothing without --keep-last: add it")
    if args.min_lr is not None and args.min_lr > args.lr:
        raise UserError(f"--min-lr {args.min_lr} is above --lr {args.lr}: lower it")
    if args.lr_warmup_init > args.lr:
        raise UserError(f"--lr-warmup-init {args.lr_warmup_init} is above --lr {args.lr}: lower it")
    if args.lr_decay_style == "WSD" and args.lr_wsd_decay_iters is None:
        raise UserError("--lr-decay-style WSD needs --lr-wsd-decay-iters: set how many steps the decay takes")
    decay = args.lr_decay_iters or args.train_iters
    if args.lr_warmup_iters >= decay and args.lr_warmup_iters:
        raise UserError(
            f"--lr-warmup-iters {args.lr_warmup_iters} leaves nothing of the {decay} steps of --train-iters "
            "or --lr-decay-iters: lower it"
        )
    if args.profile and args.profile_step_end <= args.profile_step_start:
        raise UserError(
            f"--profile-step-end {args.profile_step_end} is not after --profile-step-start "
            f"{args.profile_step_start}: nothing would be traced"
        )


def _check_sequence(args):
    tp, _, cp = _sizes(args)
    if cp > 1 and args.seq_length % (2 * cp):
        raise UserError(
            f"--seq-length {args.seq_length} is not a multiple of 2 x --context-parallel-size {cp}: "
            f"use {args.seq_length // (2 * cp) * 2 * cp} or a smaller size"
        )
    if args.seq_length // cp % tp:
        raise UserError(
            f"--seq-length {args.seq_length} gives {args.seq_length // cp} rows a context-parallel rank, "
            f"which --tensor-model-parallel-size {tp} does not divide: use a multiple of {tp * cp}"
        )
    if args.index_topk > args.seq_length:
        raise UserError(
            f"--index-topk {args.index_topk} is larger than --seq-length {args.seq_length}: "
            "lower it (a row selects at most the positions it sees)"
        )


def _load_tokenizer(args):
    if args.tokenizer_type is None:
        raise UserError(
            "--tokenizer-type is missing: train a tokenizer with tools/train_tokenizer.py "
            "or name a Hugging Face tokenizer folder"
        )
    if args.tokenizer_type.startswith("Null") and not args.vocab_size:
        raise UserError(
            f"--vocab-size is missing: --tokenizer-type {args.tokenizer_type} has no file to read it from"
        )
    quiet = copy(args)
    quiet.pad_vocab_size = False  # Megatron would log the padding
    tokenizer = load_tokenizer(quiet)
    args.tokenizer_vocab_size = tokenizer.vocab_size
    args.padded_vocab_size = vocab_size_with_padding(tokenizer.vocab_size, args, logging_enabled=False)
    return tokenizer


def _set_vocabulary(args):
    """A plan needs the size of the vocabulary only; --vocab-size stands in for a tokenizer."""
    if args.tokenizer_model is None and not args.vocab_size:
        raise UserError("--vocab-size or --tokenizer-model is missing: --dry-run needs the vocabulary's size")
    if args.tokenizer_model is not None:
        _load_tokenizer(args)
        return
    args.padded_vocab_size = vocab_size_with_padding(args.vocab_size, args, logging_enabled=False)


def _check_data(args, tokenizer):
    if args.dataloader_type == "external":
        raise UserError("--dataloader-type external has no data here: give single or cyclic, or drop it")
    if not args.mock_data:
        args.split = args.split or "99,1,0"
        validate_data_arguments(args, tokenizer)


def _megatron_checks(args) -> CLSAConfig:
    if torch.cuda.is_available() and args.tensor_model_parallel_size * args.context_parallel_size > 1:
        # Before Blackwell, the order of collectives and matrix products relies on one hardware queue.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it lists 800 arguments
            validate_args(args)
            config = core_transformer_config_from_args(args, CLSAConfig)
            _check_split(config)
            return config
    except (AssertionError, ValueError, RuntimeError) as error:
        raise UserError(str(error) or f"Megatron refuses the flags: {_asserted(error)}") from error


def _check_split(config: CLSAConfig):
    """Megatron finds out that layers do not fall on stages only when it builds one."""
    pp, chunks = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size or 1
    try:
        counts = [count for stage in range(pp) for _, count in chunk_layers(config, stage)]
        reason = f"stages get {counts} layers"
    except (AssertionError, ValueError) as error:
        counts, reason = [], str(error)
    if min(counts, default=-1) < 0 or sum(counts) != config.num_layers:
        raise UserError(
            f"--pipeline-model-parallel-size {pp} with {chunks} chunks a stage cannot split --num-layers "
            f"{config.num_layers}: {reason}"
        )


def _asserted(error: BaseException) -> str:
    """The statement that failed, of an assertion without a message: it names the flags."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return (last.line or f"{Path(last.filename).name}:{last.lineno}").removeprefix("assert ").rstrip(", \\")


def _sizes(args) -> tuple[int, int, int]:
    return args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size


def _dashed(name: str) -> str:
    return name.replace("_", "-")
