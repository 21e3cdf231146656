"""The command line: Megatron's own parser with the run's and CLSA's flags in front.

Owns defaults and precedence (house defaults < platform < recipe < phase < command line). Checks of values
against each other and against the machine are in validation.py, ranges of numbers in ranges.py.
"""

import argparse
import dataclasses
import functools
import os
from copy import deepcopy
from importlib.util import find_spec

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.arguments import add_megatron_arguments

from megatron_clsa.config import CLSAConfig
from megatron_clsa.errors import UserError
from megatron_clsa.estimate.speed import Machine
from megatron_clsa.launch import FLAG
from megatron_clsa.training.foreign_flags import refuse_foreign_flags
from megatron_clsa.training.guards import POLICIES, GuardSettings
from megatron_clsa.training.recipe import Phase, Recipe, flag_words, unknown_key
from megatron_clsa.training.teacher_flags import add_teacher_group

# What every CLSA model is, and what its checkpoints need to load at another layout. In front of everything.
HOUSE_DEFAULTS = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "disable_bias_linear": True,
    "position_embedding_type": "rope",
    "attention_dropout": 0,
    "hidden_dropout": 0,
    "calculate_per_token_loss": True,
    "reset_position_ids": True,
    "no_create_attention_mask_in_dataloader": True,
    "no_masked_softmax_fusion": True,
    "use_distributed_optimizer": True,
    "ckpt_format": "torch_dist",
    "dist_ckpt_optim_fully_reshardable": True,
    "async_save": True,
    "use_persistent_ckpt_worker": True,  # without it --async-save is switched off; ours is a thread
    "async_strategy": "mcore",
    "exit_signal_handler": True,
    "no_check_for_nan_in_loss_and_grad": True,  # guards.py does it, before the update and with a policy
    "eval_iters": 8,
    "log_interval": 1,
}
WITHOUT_TE = {
    "transformer_impl": "local",
    "no_rope_fusion": True,
    "no_persist_layer_norm": True,
}
WITHOUT_GPU = {
    "distributed_backend": "gloo",
    "use_cpu_initialization": True,
    "no_bias_dropout_fusion": True,
    "no_bias_swiglu_fusion": True,
}
# A plan is for GPUs with Transformer Engine; RoPE's fusion costs no memory and asks for the real thing.
PLANNING = {"no_rope_fusion": True}


class Parser(argparse.ArgumentParser):
    """Reports a bad flag as a `UserError`: one line, instead of the usage of 800 flags."""

    def error(self, message: str):
        raise UserError(message)

    def format_help(self) -> str:
        for (
            action
        ) in self._actions:  # some of Megatron's texts hold a bare percent sign, which argparse rejects
            if action.help and not _formats(action):
                action.help = action.help.replace("%", "%%")
        return super().format_help()


def _formats(action: argparse.Action) -> bool:
    try:
        action.help % vars(action)
    except (KeyError, TypeError, ValueError):
        return "%(prog)" in action.help
    return True


@functools.cache
def build_parser() -> Parser:
    """All flags, made once a process: Megatron reads its own sources for the help of 800 of them."""
    parser = Parser(
        usage="%(prog)s [--nproc-per-node N] --config RECIPE [flags]",
        allow_abbrev=False,
        description="Train a CLSA model through the phases of a recipe. Any flag below may stand in the "
        "recipe (dashes as underscores) or here, where it overrides the recipe in every phase.",
    )
    _add_run_group(parser)
    _add_guard_group(parser)
    add_teacher_group(parser)
    megatron = add_megatron_arguments(Parser(add_help=False, allow_abbrev=False))
    taken = {action.dest for action in megatron._actions}
    inherited = {field.name for field in dataclasses.fields(TransformerConfig)}
    ArgumentGroupFactory(CLSAConfig, exclude=[*inherited, *taken]).build_group(
        parser, title="CLSA model and loss"
    )
    add_megatron_arguments(parser)
    return parser


def _add_run_group(parser: argparse.ArgumentParser):
    group = parser.add_argument_group("run", "What to run and where its files go.")
    group.add_argument("--config", metavar="RECIPE", required=True, help="Recipe file (YAML).")
    group.add_argument("--out", metavar="DIR", help="Folder of the run. Default: runs/<recipe name>.")
    group.add_argument(
        FLAG,
        metavar="N",
        help="Start N ranks on this machine, without torchrun; keeps the exit codes 2 and 75.",
    )
    group.add_argument("--phases", metavar="A,B", help="Run only these phases of the recipe. Default: all.")
    group.add_argument(
        "--dry-run",
        nargs="?",
        type=int,
        const=0,
        metavar="RANKS",
        help="Print parameters, memory by rank, FLOPs, bytes over each link, predicted speed and days for "
        "that many ranks (default: --nproc-per-node or the launcher's), and exit. Needs no data and no GPU.",
    )
    group.add_argument(
        "--peak-tflops",
        type=float,
        metavar="X",
        help="16-bit TFLOP/s of one GPU, for MFU. Default: by the GPU's name; without one, an H100's 989.",
    )
    group.add_argument(
        "--assumed-efficiency",
        type=float,
        default=Machine.efficiency,
        metavar="X",
        help="--dry-run: share of the peak that a step reaches, sparse attention aside. "
        f"Default: {Machine.efficiency}, measured.",
    )
    group.add_argument(
        "--hang-timeout",
        type=float,
        default=1800.0,
        metavar="SECONDS",
        help="End the run, naming the rank, if no step ends for so long; evaluations, saves and the first "
        "step's compilation count too. 0 waits for ever. Default: 1800.",
    )
    group.add_argument(
        "--keep-last",
        type=int,
        metavar="N",
        help="Delete checkpoints of a phase but its newest N. Default: keep all.",
    )
    group.add_argument(
        "--keep-every",
        type=int,
        metavar="STEPS",
        help="With --keep-last: also keep the checkpoints at multiples of STEPS.",
    )
    group.add_argument(
        "--ignore-coverage-gate",
        action="store_true",
        help="Enter a phase although the index covers less than the recipe's minimum_coverage.",
    )


def _add_guard_group(parser: argparse.ArgumentParser):
    group = parser.add_argument_group("guards", "What a step that goes wrong leads to.")
    defaults = GuardSettings()
    group.add_argument(
        "--on-nan",
        choices=POLICIES,
        default=defaults.on_nan,
        help="A loss or gradient that is not finite: stop the run, skip the update, or go back to the newest "
        "checkpoint and on without that step's data. Default: stop.",
    )
    group.add_argument(
        "--on-spike",
        choices=("warn", *POLICIES),
        default=defaults.on_spike,
        help="The same for a loss above --spike-factor x its recent mean. Default: warn.",
    )
    group.add_argument("--spike-factor", type=float, default=defaults.spike_factor, help="Default: 2.")
    group.add_argument(
        "--max-bad-steps",
        type=int,
        default=defaults.max_bad_steps,
        help="Skipped or rolled back steps of a phase after which the run stops. Default: 10.",
    )
    group.add_argument(
        "--straggler-factor",
        type=float,
        default=1.3,
        metavar="X",
        help="Name ranks whose forward passes take X times the median of their stage, for 30 steps. "
        "0 never does. Default: 1.3.",
    )


def _run_options() -> argparse.Namespace:
    parser = Parser(add_help=False)
    _add_run_group(parser)
    return parser.parse_args(["--config", ""])


def recipe_options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Keys that a recipe may hold: every long flag but the run's own, dashes as underscores."""
    own = {"help", *vars(_run_options())}
    return {
        flag[2:].replace("-", "_"): action
        for flag, action in parser._option_string_actions.items()
        if flag.startswith("--") and action.dest not in own
    }


def parse_command(words: list[str]) -> argparse.Namespace:
    """The run's own flags (`--config`, `--out`, `--phases` ...), with the rest checked for spelling."""
    parser = build_parser()
    args, extra = parser.parse_known_args(words)
    if extra:
        flags = [flag for flag in parser._option_string_actions if flag.startswith("--")]
        raise UserError(unknown_key(extra[0].split("=")[0], flags, "command line", "flag"))
    return args


def check_recipe(recipe: Recipe) -> None:
    """Refuse a key that no flag has wherever it stands: a typo must not wait for the day that reads it."""
    options = recipe_options(build_parser())
    for settings in recipe.every_setting():
        flag_words(settings, options, recipe.path)


def parse_phase(recipe: Recipe, phase: Phase, command_line: list[str], ranks: int | None = None):
    """All flags of one phase, as Megatron's `parse_args` would give them.

    Args:
        command_line: the user's words; they win over the recipe.
        ranks: world size; None takes the launcher's `WORLD_SIZE`.
    """
    parser = build_parser()
    options = recipe_options(parser)
    ranks = ranks or int(os.environ.get("WORLD_SIZE", "1"))
    planning = any(word.partition("=")[0] == "--dry-run" for word in command_line)
    defaults = HOUSE_DEFAULTS | (PLANNING if planning else platform_defaults())
    words = flag_words(defaults, options, recipe.path)
    own = recipe.settings_for(phase, ranks)
    for settings in own:
        _refuse_house_off(settings, recipe)
        words += flag_words(settings, options, recipe.path)
    words += command_line
    args = deepcopy(parser.parse_args(words))  # a default may be a list, which validation changes
    refuse_foreign_flags(args, parser, HOUSE_DEFAULTS, [(recipe.path, s) for s in own])
    args._is_global_batch_size_explicitly_specified = args.global_batch_size is not None
    args.rank = int(os.environ.get("RANK", "0"))
    args.world_size = ranks
    _derive(args)
    return args


def _refuse_house_off(settings: dict, recipe: Recipe):
    for key, value in settings.items():
        if value is False and HOUSE_DEFAULTS.get(key) is True:
            raise UserError(f"{recipe.path}: {key} cannot be turned off in CLSA; remove the line")


def platform_defaults() -> dict:
    """Settings that depend on the machine alone: a GPU or not, Transformer Engine or not."""
    defaults = {} if have_transformer_engine() else dict(WITHOUT_TE)
    # The output layer is megatron-core's own linear, whose fusion is an extension of NVIDIA's apex.
    if find_spec("fused_weight_gradient_mlp_cuda") is None:
        defaults["no_gradient_accumulation_fusion"] = True
    if not torch.cuda.is_available():
        defaults |= WITHOUT_TE | WITHOUT_GPU
    return defaults


def have_transformer_engine() -> bool:
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError):
        return False
    return True


def _derive(args):
    """Values that follow from others and that nobody should have to repeat."""
    args.max_position_embeddings = args.max_position_embeddings or args.seq_length
    args.sequence_parallel = args.tensor_model_parallel_size > 1
    args.group_query_attention = args.num_query_groups is not None
    args.save_interval = args.save_interval or args.train_iters
    args.eval_interval = args.eval_interval or args.train_iters
