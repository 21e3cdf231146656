"""Evaluate a model without a download: perplexity by position, needle tasks, what the index keeps.

    python tools/evaluate.py --model DIR --text FILE --out DIR

DIR is an exported Hugging Face folder, a training run's folder or checkpoint (exported into a temporary
folder), or any other causal language model's Hugging Face folder (then without index figures).
Writes OUT/evaluation.json and OUT/evaluation.png. Owns the flags; the work is in megatron_clsa/evaluate.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_clsa.errors import OneLineParser, UserError, one_line_errors
from megatron_clsa.places import check_out, chosen_device, write_report

TASKS = ("perplexity", "needle", "index")


def _parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder, run or checkpoint")
    parser.add_argument("--tokenizer", type=Path, help="for a checkpoint (default: as in training)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--tasks", default="perplexity,needle,index", help="comma list (all three)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the weights")
    parser.add_argument("--seed", type=int, default=0, help="of the needles (0)")
    text = parser.add_argument_group("text, for perplexity and index")
    text.add_argument("--text", type=Path, nargs="+", default=[], help=".txt or .jsonl files, held out")
    text.add_argument("--json-key", default="text", help="key of the text in .jsonl (text)")
    text.add_argument("--length", type=int, default=4096, help="tokens a sequence (4096)")
    text.add_argument("--sequences", type=int, default=4, help="at most so many (4)")
    text.add_argument("--rows", type=int, default=64, help="sampled rows a sequence for the index (64)")
    needle = parser.add_argument_group("needle tasks")
    needle.add_argument("--needle-tasks", help="comma list (all five)")
    needle.add_argument("--lengths", default="1024,4096", help="prompt lengths in tokens (1024,4096)")
    needle.add_argument("--samples", type=int, default=5, help="samples a task and length (5)")
    return parser


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _check(args) -> tuple[list[str], list[int]]:
    """Chosen tasks and prompt lengths; what can be refused before a model is loaded is refused here."""
    tasks = _names(args.tasks)
    for name in tasks:
        if name not in TASKS:
            raise UserError(f"--tasks {name}: no such task; choose from {', '.join(TASKS)}")
    if not tasks:
        raise UserError(f"--tasks is empty: choose from {', '.join(TASKS)}")
    for flag in ("length", "sequences", "rows", "samples"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)}: give a positive number")
    lengths = _names(args.lengths)
    if not lengths or not all(length.isdecimal() and int(length) for length in lengths):
        raise UserError(f"--lengths {args.lengths}: give positive numbers of tokens, such as 1024,4096")
    if not args.text and {"perplexity", "index"} & set(tasks):
        raise UserError("--text is missing: perplexity and index need held-out text; or give --tasks needle")
    return tasks, [int(length) for length in lengths]


def evaluate(args) -> dict:
    """The whole report as a dictionary."""
    tasks, lengths = _check(args)
    from megatron_clsa.evaluate import retrieval
    from megatron_clsa.evaluate.checkpoint import as_folder
    from megatron_clsa.evaluate.load import open_folder, read_texts
    from megatron_clsa.evaluate.needle import PUZZLES

    chosen_device(args.device)
    needle_tasks = list(PUZZLES) if args.needle_tasks is None else _names(args.needle_tasks)
    retrieval.check_tasks(needle_tasks)
    texts = read_texts(args.text, args.json_key)
    with as_folder(args.model, args.tokenizer) as folder:
        subject = open_folder(folder, args.dtype, args.device)
    _check_model(args, subject, tasks, lengths)
    report = {"model": str(args.model), "dtype": args.dtype, "device": args.device, "seed": args.seed}
    return report | _sections(args, subject, tasks, lengths, needle_tasks, texts)


def _sections(args, subject, tasks, lengths, needle_tasks, texts) -> dict:
    from megatron_clsa.evaluate import index, perplexity, retrieval

    report = {}
    if "perplexity" in tasks:
        report["perplexity"] = perplexity.measure(subject, texts, args.length, args.sequences)
    if "needle" in tasks:
        report["needle"] = retrieval.measure(subject, needle_tasks, lengths, args.samples, args.seed)
    if "index" in tasks:
        ids = perplexity.sequences(subject, texts, args.length, args.sequences)[:, :-1]
        report["index"] = index.measure(subject, ids, args.rows)
    return report


def _check_model(args, subject, tasks: list[str], lengths: list[int]) -> None:
    config = subject.model.config
    longest = getattr(config, "max_position_embeddings", None)
    used = {"--length": args.length if {"perplexity", "index"} & set(tasks) else 0}
    used["--lengths"] = max(lengths) if "needle" in tasks else 0
    for flag, length in used.items():
        if longest and length > longest:
            raise UserError(f"{flag} {length} is more than the model's max_position_embeddings {longest}")
    if "index" not in tasks:
        return
    if not subject.is_clsa:
        raise UserError(f"--tasks index: {config.model_type} has none; give --tasks perplexity,needle")
    if args.length <= config.index_topk:
        raise UserError(
            f"--length {args.length} is not above the model's index_topk {config.index_topk}: "
            "every row would select all it sees; give a longer one or leave index out of --tasks"
        )


def _summary(report: dict) -> str:
    lines = []
    if part := report.get("perplexity"):
        lines.append(
            f"loss {part['loss']:.4f}, perplexity {part['perplexity']:.2f} at {part['length']} tokens"
        )
    for row in report.get("needle", []):
        lines.append(
            f"{row['task']:<18}{row['length']:>7} tokens  score {row['score']:.2f}  "
            f"gain over decoy {row['gain_over_decoy']:+.3f}"
        )
    if part := report.get("index"):
        mean = part["mean"]
        lines.append(
            f"coverage {mean['coverage']:.3f}, oracle {mean['oracle_coverage']:.3f}, overlap "
            f"{mean['overlap']:.3f} (mean over {len(part['by_layer'])} layers, k = {part['index_topk']})"
        )
    return "\n".join(lines)


@one_line_errors
def main() -> None:
    args = _parser().parse_args()
    check_out(args.out)
    report = evaluate(args)
    from megatron_clsa.evaluate.picture import draw

    print(_summary(report))  # first: what took hours should not be lost to a full disk
    write_report(args.out, "evaluation", report, draw)


if __name__ == "__main__":
    raise SystemExit(main())
