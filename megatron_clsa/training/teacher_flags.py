"""The teacher's flags, and their checks against the student, the machine and the teacher's folder.

Owns no loading and no loss: distill/teacher.py and distill/logit_kd.py do.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from megatron_clsa.distill.teacher import DTYPES, TeacherSpec
from megatron_clsa.errors import UserError

SIZES = ("teacher_shards", "teacher_tensor_parallel_size")
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def add_teacher_group(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("teacher", "A frozen dense model to learn from (docs/teacher.md).")
    group.add_argument("--teacher", metavar="DIR", help="Hugging Face folder of the teacher. Default: none.")
    group.add_argument(
        "--teacher-loss-coeff", type=float, default=1.0, metavar="X", help="Weight of T^2 KL. Default: 1."
    )
    group.add_argument(
        "--lm-loss-coeff",
        type=float,
        default=1.0,
        metavar="X",
        help="Weight of the language-model loss beside a teacher. Default: 1.",
    )
    group.add_argument(
        "--teacher-temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="Of both distributions. Default: 1.",
    )
    group.add_argument(
        "--teacher-top-k",
        type=int,
        default=256,
        metavar="K",
        help="Tokens of the teacher's distribution that are kept; the rest is one outcome. Default: 256.",
    )
    group.add_argument(
        "--teacher-hidden-coeff",
        type=float,
        default=0.0,
        metavar="X",
        help="Weight of the distance of matched hidden states. Default: 0.",
    )
    group.add_argument(
        "--teacher-layer-map",
        metavar="S:T,...",
        help="Pairs of student and teacher layers to match, counted from 1.",
    )
    group.add_argument(
        "--teacher-shards",
        type=int,
        default=1,
        metavar="N",
        help="Ranks that share one copy of the teacher's layers, whatever the student's sizes. Default: 1.",
    )
    group.add_argument(
        "--teacher-tensor-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="Ranks that split the teacher's heads and vocabulary, whatever the student's. Default: 1.",
    )
    group.add_argument("--teacher-dtype", choices=tuple(DTYPES), default="bf16", help="Default: bf16.")


@dataclass(frozen=True)
class TeacherSettings:
    """A phase's teacher and the weights of the losses."""

    spec: TeacherSpec
    loss_coeff: float
    lm_coeff: float
    hidden_coeff: float
    layer_map: dict[int, int]

    @staticmethod
    def of(args, vocabulary: int) -> "TeacherSettings | None":
        """From checked flags; None in a phase without a teacher. `vocabulary`: of the tokenizer."""
        if not uses_teacher(args):
            return None
        pairs = parse_layer_map(args.teacher_layer_map) if args.teacher_hidden_coeff else {}
        spec = TeacherSpec(
            Path(args.teacher),
            args.teacher_dtype,
            args.teacher_shards,
            vocabulary,
            args.teacher_top_k,
            args.teacher_temperature,
            tuple(pairs.values()),
            args.teacher_tensor_parallel_size,
        )
        return TeacherSettings(
            spec, args.teacher_loss_coeff, args.lm_loss_coeff, args.teacher_hidden_coeff, pairs
        )


def uses_teacher(args) -> bool:
    """Whether a phase learns from the teacher: no teacher reaches an indexer that trains alone."""
    taught = args.teacher_loss_coeff or args.teacher_hidden_coeff
    return bool(args.teacher and taught and args.trainable != "indexer")


def parse_layer_map(text: str | None) -> dict[int, int]:
    """`4:4,8:16` to {4: 4, 8: 16}."""
    try:
        pairs = dict(tuple(map(int, pair.split(":"))) for pair in (text or "").split(","))
    except (ValueError, TypeError):
        raise UserError(f"--teacher-layer-map {text}: give pairs student:teacher, such as 4:4,8:8") from None
    return pairs


def check_teacher(args) -> None:
    """Refuse what cannot work before anything starts.

    Raises:
        UserError: naming the flag, the value and the remedy.
    """
    _check_values(args)
    if not uses_teacher(args):
        if args.lm_loss_coeff != 1.0:
            raise UserError(
                f"--lm-loss-coeff {args.lm_loss_coeff} needs a teacher to learn from: name a --teacher with "
                "--teacher-loss-coeff above 0, or drop it"
            )
        return
    config = _teacher_config(Path(args.teacher))
    if not any(any(Path(args.teacher).glob(pattern)) for pattern in WEIGHTS):
        raise UserError(f"--teacher {args.teacher} holds no weights (*.safetensors); give a complete folder")
    if args.teacher_tensor_parallel_size > 1:
        _check_tensor_parallel(args, config)
    longest = config.get("max_position_embeddings")
    if longest and longest < args.seq_length:
        raise UserError(f"--teacher {args.teacher} reads {longest} tokens, --seq-length is {args.seq_length}")
    if args.teacher_hidden_coeff:
        _check_hidden(args, config)


def check_teacher_vocabulary(args, vocabulary: int) -> None:
    """`vocabulary`: tokens of the run's tokenizer."""
    if (
        uses_teacher(args)
        and (tokens := _teacher_config(Path(args.teacher)).get("vocab_size", 0)) < vocabulary
    ):
        raise UserError(
            f"--teacher {args.teacher} has {tokens} tokens, the tokenizer {vocabulary}: "
            "train with the teacher's tokenizer (--tokenizer-model)"
        )


def _check_values(args) -> None:
    for name in ("teacher_loss_coeff", "lm_loss_coeff", "teacher_hidden_coeff"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: give 0 or more")
    for name in ("teacher_temperature", "teacher_top_k", *SIZES):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: give a positive number")
    for name in SIZES:
        size = getattr(args, name)
        if args.world_size % size:
            raise UserError(
                f"--{name.replace('_', '-')} {size} does not divide {args.world_size} ranks: change one"
            )
    if args.teacher_shards > 1 and args.teacher_tensor_parallel_size > 1:
        raise UserError(
            f"--teacher-shards {args.teacher_shards} with --teacher-tensor-parallel-size "
            f"{args.teacher_tensor_parallel_size}: both split the same weights, set one of them"
        )


def _teacher_config(folder: Path) -> dict:
    try:
        return json.loads((folder / "config.json").read_text())
    except OSError:
        raise UserError(f"--teacher {folder} has no config.json; give a Hugging Face folder") from None
    except ValueError as error:
        raise UserError(f"--teacher {folder}: its config.json is not JSON ({error})") from None


def _check_tensor_parallel(args, config: dict) -> None:
    from transformers import AutoConfig

    size = args.teacher_tensor_parallel_size
    heads = config.get("num_attention_heads")
    counts = {
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "intermediate_size": config.get("intermediate_size"),
        "vocab_size": config.get("vocab_size"),
    }
    for name, count in counts.items():
        if count and count % size:
            raise UserError(
                f"--teacher-tensor-parallel-size {size} does not divide the teacher's {name} {count}: "
                "choose a divisor, or use --teacher-shards"
            )
    try:
        plan = AutoConfig.from_pretrained(args.teacher, local_files_only=True).base_model_tp_plan
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--teacher {args.teacher}: {str(error).splitlines()[0]}") from None
    if not plan:
        raise UserError(
            f"--teacher-tensor-parallel-size {size}: transformers has no tensor-parallel plan for "
            f"{config.get('model_type')}; use --teacher-shards"
        )


def _check_hidden(args, config: dict) -> None:
    pairs = parse_layer_map(args.teacher_layer_map)
    last = config.get("num_hidden_layers", 0)
    for student, teacher in pairs.items():
        if not (1 <= student <= args.num_layers and 1 <= teacher <= last):
            raise UserError(
                f"--teacher-layer-map {student}:{teacher}: the student has layers 1 to {args.num_layers}, "
                f"the teacher 1 to {last}"
            )
    if config.get("hidden_size") != args.hidden_size:
        raise UserError(
            f"--teacher-hidden-coeff: --hidden-size is {args.hidden_size}, the teacher's "
            f"{config.get('hidden_size')}: states of other widths cannot be matched"
        )
    if args.pipeline_model_parallel_size > 1:
        raise UserError("--teacher-hidden-coeff needs --pipeline-model-parallel-size 1: set one of them")
    if args.recompute_granularity == "full":
        raise UserError(
            "--teacher-hidden-coeff: --recompute-granularity full drops the states; use selective"
        )
