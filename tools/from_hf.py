"""Make a training checkpoint from a Hugging Face folder; see --help.

    python tools/from_hf.py out/hf start --verify

Owns the command line; the work is in megatron_clsa/convert. Needs no GPU; megatron only for --verify.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_clsa.errors import UserError, one_line_errors


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
    return parser


def _show_progress(done: int, total: int) -> None:
    end = "\n" if done == total else ""
    print(f"\rtensors: {done} of {total}", end=end, file=sys.stderr, flush=True)


def _tokenizer(given: Path | None, model: Path) -> Path | None:
    if given is not None and not given.exists():
        raise UserError(f"--tokenizer {given} does not exist")
    own = any((model / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    return given or (model if own else None)


@one_line_errors
def main() -> None:
    import torch

    from megatron_clsa.convert.export import whole_folder
    from megatron_clsa.convert.imports import architecture_of, write_checkpoint
    from megatron_clsa.convert.weights import WeightFolder

    args = _parser().parse_args()
    source = WeightFolder(args.model)
    arch = architecture_of(source, _tokenizer(args.tokenizer, args.model))
    with whole_folder(args.out, args.force) as temporary:
        dtype = getattr(torch, args.dtype) if args.dtype else None
        write_checkpoint(source, arch, temporary, dtype, _show_progress)
        if args.verify:
            _verify(temporary, arch, args.model, args.dtype)
    print(f"{args.out}: made from {args.model}")


def _verify(checkpoint: Path, arch, model: Path, dtype: str | None) -> None:
    from megatron_clsa.convert.checkpoint import TorchDistReader, find_checkpoint
    from megatron_clsa.convert.verify import TOLERANCE, verify

    if dtype not in (None, "float32"):
        raise UserError(f"--verify compares fp32 logits: leave --dtype {dtype} out, or --verify")
    worst = verify(TorchDistReader(find_checkpoint(checkpoint)), arch, model)
    print(f"verified: logits differ by at most {worst:.1e} (limit {TOLERANCE:.0e}) over all positions")


if __name__ == "__main__":
    raise SystemExit(main())
