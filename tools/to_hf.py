"""Convert a checkpoint of any parallel layout to a Hugging Face folder; see --help.

    python tools/to_hf.py runs/quick out/hf --tokenizer tokenizer.model --verify

Owns the command line; the work is in megatron_clsa/convert. Needs no GPU; megatron only for --verify.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_clsa.errors import OneLineParser, UserError, one_line_errors, say

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if not match or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: give a size such as 5GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="a run's folder, a phase's, or one iter_* folder")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument(
        "--tokenizer", type=Path, help="Hugging Face folder or SentencePiece file (default: as in training)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="(the checkpoint's)")
    parser.add_argument("--max-shard-size", type=_bytes, default="5GB", metavar="SIZE", help="(5GB)")
    parser.add_argument(
        "--verify", action="store_true", help="compare the logits of all positions before it is published"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    return parser


def _tokenizer(given: Path | None, trained_with: str | None) -> Path | None:
    if given is not None and not given.exists():
        raise UserError(f"--tokenizer {given} does not exist")
    if given is None and trained_with and not Path(trained_with).exists():
        raise UserError(f"the tokenizer of training, {trained_with}, is gone: give --tokenizer")
    return given or (Path(trained_with) if trained_with else None)


@one_line_errors
def main() -> None:
    import torch

    from megatron_clsa.convert.architecture import read_architecture
    from megatron_clsa.convert.checkpoint import TorchDistReader, find_checkpoint
    from megatron_clsa.convert.export import ExportOptions, export, write_config
    from megatron_clsa.convert.progress import Bar
    from megatron_clsa.convert.whole_folder import whole_folder

    args = _parser().parse_args()
    if args.verify and args.dtype not in (None, "float32"):
        raise UserError(f"--verify compares fp32 logits: leave --dtype {args.dtype} out, or --verify")
    folder = find_checkpoint(args.checkpoint)
    arch = read_architecture(folder)
    reader = TorchDistReader(folder)
    options = ExportOptions(
        getattr(torch, args.dtype) if args.dtype else None,
        args.max_shard_size,
        _tokenizer(args.tokenizer, arch.tokenizer_model),
        run=next(iter(folder.resolve().parents[2:3]), None),
    )
    with whole_folder(args.out, args.force, (folder,)) as temporary:
        config = export(reader, arch, temporary, options, Bar("weights", "MB", 10**6))
        if args.verify:
            from megatron_clsa.convert.verify import verify

            print(verify(reader, arch, temporary, config))
        write_config(temporary, config)  # from here on it loads
    if arch.cross_attention == "dense":
        say(f"WARNING: {folder} is of a phase with dense cross-attention, and {args.out} reads that way, too")
    print(f"{args.out}: made from {folder}")


if __name__ == "__main__":
    raise SystemExit(main())
