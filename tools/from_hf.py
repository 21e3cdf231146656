"""Make a training checkpoint from a Hugging Face folder; see --help.

    python tools/from_hf.py out/hf start --verify
    python tools/from_hf.py --init-from qwen3 Qwen3-0.6B start

Owns the command line; the work is in megatron_clsa/convert. Needs no GPU; megatron only for --verify.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_clsa.errors import OneLineParser, UserError, one_line_errors
from megatron_clsa.places import chosen_device

_DENSE_DEFAULTS = {
    "num_self_decoder_layers": None,
    "sliding_window": 512,
    "index_topk": 2048,
    "index_head_dim": 128,
    "index_qk_norm": False,
    "ignore_rope_scaling": False,
}
_POSITIVE = (
    "num_self_decoder_layers", "sliding_window", "index_topk", "index_head_dim", "position_span",
    "calibration_tokens", "calibration_length",
)  # fmt: skip


def _parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a Hugging Face model")
    parser.add_argument(
        "out", type=Path, help="folder to make; distill.py takes it as --pretrained-checkpoint"
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="folder or SentencePiece file (default: the model's own)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="(the folder's)")
    parser.add_argument("--verify", action="store_true", help="compare the logits of all positions")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    _add_dense_group(parser.add_argument_group("from a dense Transformer (docs/convert.md explains each)"))
    return parser


def _add_dense_group(group) -> None:
    group.add_argument(
        "--init-from",
        choices=("llama", "mistral", "qwen2", "qwen3"),
        help="MODEL is a dense model of this family",
    )
    group.add_argument(
        "--memory-init",
        choices=("aligned", "mean", "first", "random"),
        default="aligned",
        help="how the shared keys and values start (aligned)",
    )
    group.add_argument(
        "--memory-position",
        choices=("average", "drop"),
        default="average",
        help="what becomes of RoPE in the layers that read the memory (average)",
    )
    group.add_argument(
        "--position-span", type=int, metavar="N", help="distances that average averages (the window)"
    )
    for name, default in _DENSE_DEFAULTS.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(default, bool):
            group.add_argument(flag, action="store_true")
        else:
            group.add_argument(flag, type=int, default=default, metavar="N", help=f"({default or 'half'})")
    group.add_argument(
        "--calibration-text",
        type=Path,
        metavar="PATH",
        help="file or folder of text that aligned reads (the Python standard library's sources)",
    )
    group.add_argument("--calibration-tokens", type=int, default=16384, metavar="N", help="(16384)")
    group.add_argument(
        "--calibration-length", type=int, default=1024, metavar="N", help="tokens a row (1024)"
    )
    group.add_argument("--device", default="cpu", help="where the dense model runs for aligned (cpu)")
    group.add_argument("--seed", type=int, default=1234, help="of everything random (1234)")


def _tokenizer(given: Path | None, model: Path) -> Path | None:
    if given is not None and not given.exists():
        raise UserError(f"--tokenizer {given} does not exist")
    own = any((model / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    return given or (model if own else None)


@one_line_errors
def main() -> None:
    import torch

    from megatron_clsa.convert.imports import architecture_of, write_checkpoint
    from megatron_clsa.convert.progress import Bar
    from megatron_clsa.convert.weights import WeightFolder
    from megatron_clsa.convert.whole_folder import whole_folder

    args = _parser().parse_args()
    _check(args)
    source, tokenizer, report = WeightFolder(args.model), _tokenizer(args.tokenizer, args.model), None
    with whole_folder(args.out, args.force, (args.model,)) as temporary:
        if args.init_from:
            source, arch, report = _dense(source, tokenizer, args)
        else:
            arch = architecture_of(source, tokenizer)
        dtype = getattr(torch, args.dtype) if args.dtype else None
        write_checkpoint(source, arch, temporary, dtype, Bar("weights", "tensors"))
        if report is not None:
            (temporary / "start.json").write_text(json.dumps(report, indent=1) + "\n")
        if args.verify:
            _verify(temporary, arch, source, args)
        arch.write(temporary)  # from here on it is a checkpoint
    print(f"{args.out}: made from {args.model}")


def _dense_defaults() -> dict:
    """Every flag of the dense group but --init-from, with its default."""
    parser = OneLineParser()
    _add_dense_group(parser)
    return {name: value for name, value in vars(parser.parse_args([])).items() if name != "init_from"}


def _check(args) -> None:
    """What can be refused before anything is read."""
    if args.init_from is None:
        given = [name for name, value in _dense_defaults().items() if getattr(args, name) != value]
        if given:
            raise UserError(f"--{given[0].replace('_', '-')} is for a dense model: give --init-from, too")
        return
    if not -(2**63) <= args.seed < 2**63:
        raise UserError(f"--seed {args.seed}: give a number of 64 bits")
    for name in _POSITIVE:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: give a positive number")


def _dense(folder, tokenizer: Path | None, args):
    from megatron_clsa.convert.dense import DenseChoices
    from megatron_clsa.convert.dense_start import StartChoices, make_start

    if args.verify:
        raise UserError("--verify compares with a CLSA folder: export with to_hf.py --verify instead")
    dense = DenseChoices(**{name: getattr(args, name) for name in _DENSE_DEFAULTS})
    chosen = StartChoices(
        args.init_from,
        dense,
        args.memory_init,
        args.memory_position,
        args.sliding_window if args.position_span is None else args.position_span,
        args.seed,
        args.calibration_text,
        args.calibration_tokens,
        args.calibration_length,
        str(chosen_device(args.device)),
    )
    source, arch, report = make_start(folder, tokenizer, chosen)
    for line in report["notes"]:
        print(line)
    for name, loss in report["loss"].items():
        print(f"loss a token of held-out text, {name}: {loss:.4f}")
    return source, arch, report


def _verify(checkpoint: Path, arch, source, args) -> None:
    from megatron_clsa.convert.checkpoint import TorchDistReader, find_checkpoint
    from megatron_clsa.convert.verify import verify

    if args.dtype not in (None, "float32"):
        raise UserError(f"--verify compares fp32 logits: leave --dtype {args.dtype} out, or --verify")
    print(verify(TorchDistReader(find_checkpoint(checkpoint)), arch, args.model, source.config))


if __name__ == "__main__":
    raise SystemExit(main())
