"""Count the bytes that each link brings to a rank in one full-size step, and hold the estimate to them.

Owns the command line and the table. Runs anywhere, on fake tensors and a fake process group; times nothing.

    python tools/count_parallel.py --tp 2 --cp 4 --seq 131072
"""

import argparse
import contextlib
import io
import json
import logging
import os
import sys

import torch

import megatron_clsa.parallel.cpu  # noqa: F401
from megatron_clsa.errors import OneLineParser, UserError, one_line_errors

FIELDS = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
MODELS = {"4b": (32, 2560, 7680, 20, 4), "7b": (32, 4096, 11008, 32, 8)}
COMMON = dict(kv_channels=128, sliding_window=512, index_topk=2048, index_head_dim=128)
PHASES = {
    "dense": dict(cross_attention="dense", trainable="backbone"),
    "warmup": dict(cross_attention="dense", kd_loss="full", trainable="indexer"),
    "sparse": dict(cross_attention="sparse", kd_loss="selected"),
}
TOLERANCE = 0.01  # padding of gradient buckets, flags and shapes are in no formula


def _parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="4b", help="widths and layers (4b)")
    parser.add_argument("--phase", choices=PHASES, nargs="+", default=list(PHASES), help="(all)")
    for name in ("tp", "pp", "cp", "dp"):
        parser.add_argument(f"--{name}", type=int, default=1, help="parallel size (1)")
    parser.add_argument("--seq", type=int, default=32768, help="tokens of a sequence (32768)")
    parser.add_argument("--vocab", type=int, default=131072, help="padded vocabulary (131072)")
    parser.add_argument("--microbatches", type=int, default=4, help="of a replica a step (4)")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    return parser


def _check(args) -> None:
    for name in ("tp", "pp", "cp", "dp", "seq", "vocab", "microbatches"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: give a positive number")
    if args.seq % (2 * args.cp * args.tp):
        raise UserError(f"--seq {args.seq} is not divisible by 2 x CP x TP = {2 * args.cp * args.tp}")
    if args.vocab % args.tp:
        raise UserError(f"--vocab {args.vocab} is not divisible by --tp {args.tp}")
    if args.pp not in (1, 2, 4, 8):
        raise UserError(f"--pp {args.pp}: choose 1, 2, 4 or 8")
    if args.microbatches < args.pp:
        raise UserError(f"--microbatches {args.microbatches} is less than --pp {args.pp}: raise it")
    if args.json and not os.path.isdir(os.path.dirname(os.path.abspath(args.json))):
        raise UserError(f"--json {args.json}: its folder does not exist; make it first")


@contextlib.contextmanager
def _quiet():
    """megatron-core counts parameters aloud and warns of what a pretended rank lacks."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _rows(args, phase: str):
    """One row a pipeline stage and link."""
    from multirank import pretend, traffic
    from multirank.layouts import Case, Layout, Workload

    from megatron_clsa.estimate import links

    layout = Layout(args.tp, args.pp, args.cp, args.dp)
    widths = dict(zip(FIELDS, MODELS[args.model], strict=True)) | COMMON
    switches = dict(perform_initialization=False, deallocate_pipeline_outputs=False)
    work = Workload(args.seq, args.vocab, 1, args.microbatches * args.dp, torch.bfloat16)
    case = Case(phase, packed=False, overrides=widths | switches, work=work, **PHASES[phase])
    with _quiet():
        counts = pretend.count(layout, case)
    for stage, (received, config) in enumerate(counts):
        estimated = links.of_stage(pretend.run_shape(layout, case, config), stage)
        for link, counted in traffic.totals(received).items():
            row = {"phase": phase, "stage": stage, "link": link, "counted": counted}
            row |= {"estimated": estimated[link], "operations": received[link]}
            yield row | {"ok": abs(counted - estimated[link]) <= TOLERANCE * estimated[link] + 4096}


def _show(row: dict) -> None:
    verdict = "ok" if row["ok"] else "FAIL"
    sizes = f"{row['counted'] / 2**20:>12,.2f} {row['estimated'] / 2**20:>12,.2f}"
    calls = ", ".join(
        f"{calls} {name} {size / 2**20:,.1f}" for name, (calls, size) in row["operations"].items()
    )
    print(f"{verdict:<5}{row['phase']:<7} {row['stage']:>5} {row['link']:<4} {sizes}  {calls}", flush=True)


@one_line_errors
def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    _check(args)
    print(f"{'':<5}{'phase':<7} stage link {'counted MiB':>12} {'estimate':>12}  operations, MiB")
    rows = []
    for phase in args.phase:
        for row in _rows(args, phase):
            if row["counted"] or row["estimated"]:
                rows.append(row)
                _show(row)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(vars(args) | {"rows": rows}, file, indent=1)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
