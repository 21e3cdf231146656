"""Refuses a teacher that cannot work, before anything starts: its flags, sizes, folder and tokenizer.

Owns the messages; loads no weights. The same on every rank. Flags: teacher_flags.py.
"""

import math
from importlib.util import find_spec
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer

from megatron_clsa.convert.weights import WeightFolder
from megatron_clsa.errors import UserError
from megatron_clsa.training.teacher_flags import parse_layer_map, uses_teacher

SIZES = ("teacher_shards", "teacher_tensor_parallel_size")


def check_teacher(args) -> None:
    """Of the flags and the folder.

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
    config = _open_teacher(args.teacher)
    if args.teacher_tensor_parallel_size > 1:
        _check_tensor_parallel(args.teacher_tensor_parallel_size, config)
    longest = getattr(config, "max_position_embeddings", None)
    if longest and longest < args.seq_length:
        raise UserError(f"--teacher {args.teacher} reads {longest} tokens, --seq-length is {args.seq_length}")
    if args.teacher_hidden_coeff:
        _check_hidden(args, config)


def check_teacher_vocabulary(args, vocabulary: int) -> None:
    """Of the tokens. `vocabulary`: of the run's tokenizer."""
    if not uses_teacher(args):
        return
    if (tokens := _open_teacher(args.teacher).vocab_size) < vocabulary:
        raise UserError(
            f"--teacher {args.teacher} has {tokens} tokens, the tokenizer {vocabulary}: "
            "train with the teacher's tokenizer (--tokenizer-model)"
        )
    if args.teacher_top_k > vocabulary:
        raise UserError(
            f"--teacher-top-k {args.teacher_top_k} is more than the tokenizer's {vocabulary} tokens: "
            f"give {vocabulary}, which is the full KL, or fewer"
        )
    _check_same_tokens(args)


def _check_values(args) -> None:
    for name in ("teacher_loss_coeff", "lm_loss_coeff", "teacher_hidden_coeff"):
        if not 0 <= getattr(args, name) < math.inf:
            raise UserError(f"{_flag(name)} {getattr(args, name)}: give 0 or more")
    for name in ("teacher_temperature", "teacher_top_k", *SIZES):
        if not 0 < getattr(args, name) < math.inf:
            raise UserError(f"{_flag(name)} {getattr(args, name)}: give a positive number")
    for name in SIZES:
        if args.world_size % getattr(args, name):
            raise UserError(
                f"{_flag(name)} {getattr(args, name)} does not divide {args.world_size} ranks: change one"
            )
    if args.teacher_shards > 1 and args.teacher_tensor_parallel_size > 1:
        raise UserError(
            f"--teacher-shards {args.teacher_shards} with --teacher-tensor-parallel-size "
            f"{args.teacher_tensor_parallel_size}: both split the same weights, set one of them"
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _open_teacher(folder: str):
    """Its configuration as transformers reads it, with the files of its weights found whole."""
    if find_spec("transformers") is None:
        raise UserError(f"--teacher {folder} needs transformers: pip install 'megatron_clsa[hf]'")
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        WeightFolder(Path(folder))
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except UserError as error:
        raise UserError(f"--teacher {error}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--teacher {folder}: {str(error).splitlines()[0]}") from None
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"--teacher {folder}: {config.model_type} is no causal language model")
    return config


def _check_tensor_parallel(size: int, config) -> None:
    heads = config.num_attention_heads
    counts = {
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "intermediate_size": getattr(config, "intermediate_size", None),
        "vocab_size": config.vocab_size,
    }
    for name, count in counts.items():
        if count and count % size:
            raise UserError(
                f"--teacher-tensor-parallel-size {size} does not divide the teacher's {name} {count}: "
                "choose a divisor, or use --teacher-shards"
            )
    if not config.base_model_tp_plan:
        raise UserError(
            f"--teacher-tensor-parallel-size {size}: transformers has no tensor-parallel plan for "
            f"{config.model_type}; use --teacher-shards"
        )


def _check_hidden(args, config) -> None:
    for student, teacher in parse_layer_map(args.teacher_layer_map).items():
        if not (1 <= student <= args.num_layers and 1 <= teacher <= config.num_hidden_layers):
            raise UserError(
                f"--teacher-layer-map {student}:{teacher}: the student has layers 1 to {args.num_layers}, "
                f"the teacher 1 to {config.num_hidden_layers}"
            )
    if config.hidden_size != args.hidden_size:
        raise UserError(
            f"--teacher-hidden-coeff: --hidden-size is {args.hidden_size}, the teacher's "
            f"{config.hidden_size}: states of other widths cannot be matched"
        )


def _check_same_tokens(args) -> None:
    """An id that both tokenizers name must be one token: as many tokens do not make a tokenizer the same."""
    if args.tokenizer_model is None:
        return
    run, teacher = tokens_of(Path(args.tokenizer_model)), tokens_of(Path(args.teacher))
    if run is None or teacher is None:
        return
    for number in sorted(run.keys() & teacher.keys()):
        if run[number] != teacher[number]:
            raise UserError(
                f"--teacher {args.teacher} has another tokenizer: token {number} is {teacher[number]!r}, in "
                f"--tokenizer-model {args.tokenizer_model} it is {run[number]!r}; train with the teacher's"
            )


def tokens_of(source: Path) -> dict[int, str] | None:
    """Id -> token of a folder's or a SentencePiece file's tokenizer; None where there is none to read."""
    try:
        if (source / "tokenizer.json").is_file():
            vocabulary = Tokenizer.from_file(str(source / "tokenizer.json")).get_vocab()
            return {number: token for token, number in vocabulary.items()}
        path = source / "tokenizer.model" if source.is_dir() else source
        model = sentencepiece.SentencePieceProcessor()
        model.LoadFromSerializedProto(path.read_bytes())
        return {number: model.IdToPiece(number) for number in range(model.GetPieceSize())}
    except Exception:  # the tokenizers library raises bare ones
        return None
