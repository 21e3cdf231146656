"""The teacher's flags and what a phase makes of them.

Owns no refusal (teacher_checks.py), no loading (distill/teacher.py) and no loss (distill/logit_kd.py,
distill/hidden_match.py).
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from megatron_clsa.distill.teacher import DTYPES, TeacherSpec
from megatron_clsa.errors import UserError


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
        pairs = [tuple(map(int, pair.split(":"))) for pair in (text or "").split(",")]
        layers = {student: teacher for student, teacher in pairs}
    except ValueError:
        raise UserError(f"--teacher-layer-map {text}: give pairs student:teacher, such as 4:4,8:8") from None
    if len(layers) < len(pairs):
        raise UserError(
            f"--teacher-layer-map {text} names a student layer twice: match it to one teacher layer"
        )
    return layers
