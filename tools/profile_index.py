"""Show what a model's index looks like to a kernel: overlap, unions, runs, empty blocks, hot keys.

    python tools/profile_index.py --index FILE.pt --out DIR
    python tools/profile_index.py --model DIR --text FILE --length 32768 --out DIR

FILE.pt holds an index `[s, k]` or `[b, s, k]` as torch.save writes it: each row's positions ascend, none is
beyond the row's own, -1 fills. DIR is an exported Hugging Face
folder, a training run's folder or a checkpoint. Writes OUT/index.json and OUT/index.png, one entry a
sequence. Owns the flags and the picture; the figures are in megatron_clsa/evaluate/index_structure.py.
"""

import argparse
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_clsa.errors import OneLineParser, UserError, one_line_errors
from megatron_clsa.evaluate.index_structure import structure
from megatron_clsa.places import check_out, chosen_device, write_report

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--index", type=Path, help="a saved index, [s, k] or [b, s, k], -1 fills")
    source.add_argument("--model", type=Path, help="Hugging Face folder, run or checkpoint")
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="with --model: .txt or .jsonl files")
    parser.add_argument("--json-key", default="text", help="key of the text in .jsonl (text)")
    parser.add_argument("--tokenizer", type=Path, help="for a checkpoint (default: as in training)")
    parser.add_argument("--length", type=int, default=4096, help="tokens a sequence (4096)")
    parser.add_argument("--sequences", type=int, default=1, help="at most so many (1)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the weights")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    return parser


def _check(args) -> None:
    """Refuse what can be refused before anything is loaded."""
    for flag in ("length", "sequences"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)}: give a positive number")
    chosen_device(args.device)
    check_out(args.out)


def _saved(path: Path) -> torch.Tensor:
    """`[b, s, k]` int32 of a file."""
    try:
        with warnings.catch_warnings(action="ignore"):  # sparse tensors warn, and are refused below
            index = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"--index {path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # pickle and zip raise many kinds, some with a number for a message
        kind = type(error).__name__
        raise UserError(f"--index {path} is no file of torch.save ({kind}): give one") from error
    if not torch.is_tensor(index) or index.dim() not in (2, 3) or not index.numel():
        raise UserError(f"--index {path}: give a tensor [s, k] or [b, s, k] that is not empty")
    if index.layout != torch.strided or index.dtype not in INTEGERS:
        raise UserError(f"--index {path} is {index.layout}, {index.dtype}: give a dense tensor of integers")
    index = index if index.dim() == 3 else index[None]
    _check_positions(index, path)
    return index.int()


def _check_positions(index: torch.Tensor, path: Path) -> None:
    """Hold `[b, s, k]` to what the kernels promise: the figures are wrong for any other order."""
    own = torch.arange(index.shape[1])[:, None]
    before, after = index[..., :-1], index[..., 1:]
    ascends = (after == -1) | ((before >= 0) & (after > before))
    faults = {
        "give -1 or positions from 0 to the row's own": ((index < -1) | (index > own)).any(-1),
        "give positions that ascend, each once, and -1 only after them": ~ascends.all(-1),
    }
    for remedy, rows in faults.items():
        if rows.any():
            sequence, row = rows.nonzero()[0].tolist()
            raise UserError(f"--index {path}, sequence {sequence}, row {row}: {remedy}")


def _computed(args) -> torch.Tensor:
    """`[b, s, k]` of a model on the given texts."""
    if not args.text:
        raise UserError("--text is missing: an index of --model needs text")
    from megatron_clsa.evaluate.checkpoint import as_folder
    from megatron_clsa.evaluate.index import whole_index
    from megatron_clsa.evaluate.load import open_folder, read_texts
    from megatron_clsa.evaluate.perplexity import sequences

    texts = read_texts(args.text, args.json_key)
    with as_folder(args.model, args.tokenizer) as folder:
        subject = open_folder(folder, args.dtype, args.device)
    if not subject.is_clsa:
        raise UserError(f"--model {args.model}: {subject.model.config.model_type} has no index")
    ids = sequences(subject, texts, args.length, args.sequences)[:, :-1]
    return torch.stack([whole_index(subject.model.model, row) for row in ids])


def draw(reports: list[dict], path: Path) -> None:
    """Overlap by lag, union by tile, selections by run length; one line a sequence."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4))
    for report in reports:
        runs = report["run_lengths"].get("share_in_runs_of_at_least", {})
        curves = (report["overlap_by_lag"], report["union_over_k"], runs)
        for axis, curve in zip(axes, curves, strict=True):
            axis.plot(list(curve), list(curve.values()), marker="o")
            axis.set_xscale("log", base=2)
            axis.set_ylim(bottom=0)
    axes[0].set(xlabel="lag (rows)", ylabel="share of the selection", title="shared with an earlier row")
    axes[1].set(xlabel="T (consecutive rows)", ylabel="union / k", title="union of T selections")
    axes[2].set(xlabel="run of at least", ylabel="share of positions", title="consecutive positions")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


@one_line_errors
def main() -> None:
    args = _parser().parse_args()
    _check(args)
    index = _saved(args.index) if args.index else _computed(args)
    reports = [structure(row) for row in index]
    if not any(report["long_rows"] for report in reports):
        raise UserError(
            f"no row sees more than k = {index.shape[-1]} keys, so that every row selects all: "
            f"give {'an index' if args.index else '--length'} above {index.shape[-1]}"
        )
    for report in reports:  # first: what took long should not be lost to a full disk
        overlap, union = report["overlap_by_lag"], report["union_over_k"]
        print(f"{report['long_rows']} rows, k {report['index_topk']}: shared with the row before "
              f"{overlap.get(1, float('nan')):.3f}, union of 16 / k {union.get(16, float('nan')):.2f}, "
              f"empty blocks {report['empty_blocks']}")  # fmt: skip
    write_report(args.out, "index", reports, draw)


if __name__ == "__main__":
    sys.exit(main())
