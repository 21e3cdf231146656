"""Time CLSA's training step over this host's GPUs, beside Megatron-Core's dense GPT; see --help.

Owns the command line, the cases and the rows of docs/results/parallel.json. A slice of the paper's 4B: its
widths, few layers, a small vocabulary. One process a GPU is started here; torchrun is not needed.

    python tools/bench_parallel.py --gpus 4
    python tools/bench_parallel.py --gpus 2 --tiny --only scaling     # gloo, CPU: the tool's own test
"""

import argparse
import shlex
import statistics
import sys
import time

import torch
from bench.harness import length_name, machine, merge_rows

import megatron_clsa.parallel.cpu  # noqa: F401
from megatron_clsa.errors import OneLineParser, UserError, one_line_errors

RESULTS = "docs/results/parallel.json"
FAMILIES = ("scaling", "long", "exchanges")
WIDTHS = dict(
    hidden_size=2560,
    ffn_hidden_size=7680,
    num_attention_heads=20,
    num_query_groups=4,
    kv_channels=128,
    sliding_window=512,
    index_topk=2048,
    index_head_dim=128,
)
ON_GPU = dict(perform_initialization=False, init_method_std=0.02)
TINY = dict(num_attention_heads=4, num_query_groups=4, sliding_window=5)


def _parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, help="ranks, 1, 2, 4 or 8 (all GPUs)")
    parser.add_argument("--only", nargs="+", metavar="FAMILY", help=f"of {', '.join(FAMILIES)} (all)")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="as strong_tp2, weak_dp4, long_cp4 (all)")
    parser.add_argument("--layers", type=int, default=4, help="of the slice, half of them cross layers (4)")
    parser.add_argument("--vocab", type=int, default=16384, help="padded vocabulary of the slice (16384)")
    parser.add_argument("--impl", choices=["local", "transformer_engine"], help="(the latter if it is there)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps a side, after 2 more (3)")
    parser.add_argument("--seconds", type=float, default=20.0, help="after these a case times no more (20)")
    parser.add_argument(
        "--limit", type=float, default=180.0, help="seconds after which a case is ended (180)"
    )
    parser.add_argument("--no-peer", action="store_true", help="leave out the dense GPT")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes in fp32, for CPUs")
    parser.add_argument("--out", help="docs/results/parallel.json, nothing with --tiny; other rows stay")
    return parser


def _impl(args) -> str:
    from megatron_clsa.training.arguments import have_transformer_engine

    usable = torch.cuda.is_available() and have_transformer_engine()
    if args.impl == "transformer_engine" and not usable:
        raise UserError("--impl transformer_engine needs a GPU and Transformer Engine; leave the flag out")
    return args.impl or ("transformer_engine" if usable else "local")


def _gpus(args) -> int:
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    asked = args.gpus or there
    if asked not in (1, 2, 4, 8):
        raise UserError(f"--gpus {asked}: choose 1, 2, 4 or 8")
    if not args.tiny and asked > there:
        raise UserError(f"--gpus {asked}: here are {there}; ask for fewer, or give --tiny for the CPU")
    return asked


def _cases(args, gpus: int) -> dict[str, tuple]:
    """Name to (family, layout, tokens of a sequence, microbatches of the global batch)."""
    from multirank.layouts import Layout

    short, long = (32, 64) if args.tiny else (8192, 131072)
    micro = 4 if args.tiny else 8
    cases = {"strong_single": ("scaling", Layout(), short, micro)}
    for size in (size for size in (8, 4, 2) if size <= gpus):  # the most telling first
        for name in ("tp", "cp", "dp", "pp"):
            fits = args.layers % size == 0 if name == "pp" else name != "tp" or size <= 4
            if fits:
                cases[f"strong_{name}{size}"] = "scaling", Layout(**{name: size}), short, micro
        cases[f"weak_dp{size}"] = "scaling", Layout(dp=size), short, micro * size
        cases[f"long_cp{size}"] = "long", Layout(cp=size), long, 1
        cases[f"exchange_cp{size}"] = "exchanges", Layout(cp=size), long, 1
    return cases


def _chosen(args, cases: dict) -> dict:
    for flag, asked, known in (("--only", args.only, FAMILIES), ("--cases", args.cases, cases)):
        if unknown := [name for name in asked or [] if name not in known]:
            raise UserError(f"{flag} {unknown[0]} is not there; choose from {', '.join(known)}")
    kept = {name: case for name, case in cases.items() if not args.only or case[0] in args.only}
    return {name: kept[name] for name in args.cases} if args.cases else kept


def _case(args, impl: str, seq: int, micro: int):
    """Sparse adaptation: the sparse index with its distillation loss, everything trains."""
    from multirank.layouts import Case, Workload

    work = Workload(seq, 64 if args.tiny else args.vocab, 1, micro, _dtype(args), impl)
    widths = TINY if args.tiny else WIDTHS | ON_GPU
    overrides = widths | {"num_layers": args.layers}
    return Case("sparse", kd_loss="selected", packed=False, overrides=overrides, work=work)


def _dtype(args) -> torch.dtype:
    return torch.float32 if args.tiny else torch.bfloat16


def _common(args, name: str, layout, case, impl: str) -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    widths = case.overrides
    shape = (
        f"{widths['num_layers']} layers, hidden {widths.get('hidden_size', 32)}, "
        f"{widths['num_attention_heads']}/{widths['num_query_groups']} heads, vocabulary {case.work.vocab}, "
        f"{case.work.num_micro} x {case.work.seq} tokens, {case.work.dtype}, {impl}"
    )
    words = ["python", "tools/bench_parallel.py", "--gpus", str(layout.world), "--cases", name]
    words += ["--layers", str(args.layers)] if args.layers != 4 else []
    return {
        "shape": shape,
        "machine": f"{layout.world} x {machine(device)}",
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(words + (["--tiny"] if args.tiny else [])),
        "gpus": layout.world,
    }


def _step_rows(args, ranks, name: str, layout, case, impl: str) -> list[dict]:
    from multirank import predicted

    try:
        parts = _timed(args, ranks, layout, case, not args.no_peer)
        answers = next(parts)
    except AssertionError as error:
        if args.no_peer:
            raise
        print(f"  {name} fails with its peer, tried without: {error}", flush=True)
        parts = _timed(args, ranks, layout, case, False)
        answers = next(parts)
    value, peer = (_milliseconds(answers, side) for side in ("ours", "peer"))
    tokens = case.work.seq * case.work.num_micro
    row = {
        "metric": f"{name}_{length_name(case.work.seq)}_ms",
        "value": value,
        "unit": "ms",
        "peer": answers[0].get("peer_name"),
        "peer_value": peer,
        "ratio": round(value / peer, 4) if peer else None,
        **_common(args, name, layout, case, impl),
        "tokens_per_second": round(tokens / value * 1e3, 1),
        "peer_tokens_per_second": round(tokens / peer * 1e3, 1) if peer else None,
        "peak_memory_gib": round(max(found["ours_peak_bytes"] for found in answers) / 2**30, 2),
        **predicted.of_step(layout, case, impl, value),
    }
    return [row | _trace(parts)]


def _timed(args, ranks, layout, case, peer: bool):
    from multirank import timing

    arguments = layout, case, peer, args.steps, args.seconds
    return ranks.in_parts(2, timing.timed, *arguments, world=layout.world)


def _trace(parts) -> dict:
    """Bytes and NCCL time of each side; a trace that fails leaves the times as they are."""
    try:
        traces = next(parts)
    except AssertionError as error:
        print(f"  no trace: {error}", flush=True)
        return {}
    found = {}
    for side, prefix in (("ours", ""), ("peer", "peer_")):
        if side in traces[0]:
            found[f"{prefix}counted_mib"] = _busiest([trace[side][0] for trace in traces])
            found[f"{prefix}nccl_ms"] = {key: round(ms, 3) for key, ms in traces[0][side][1].items()}
    return found


def _milliseconds(answers: list[dict], side: str) -> float | None:
    """Median step of the slowest rank."""
    if side not in answers[0]:
        return None
    slowest = [max(times) for times in zip(*(found[side] for found in answers), strict=True)]
    return round(1e3 * statistics.median(slowest), 3)


def _busiest(links: list[dict[str, float]]) -> dict[str, float]:
    """MiB a step that the rank receives which receives most over that link."""
    return {link: round(max(rank[link] for rank in links) / 2**20, 3) for link in links[0]}


def _exchange_rows(args, ranks, name: str, layout, case, impl: str) -> list[dict]:
    """The memory's gather of one microbatch and one window layer's halo, forward, with nothing beside."""
    from multirank import predicted, timing

    answers = ranks.among(layout.world, timing.exchanges, layout, case, args.steps)
    rows = []
    for kind in answers[0]:
        slowest = [max(times) for times in zip(*(found[kind][0] for found in answers), strict=True)]
        size = max(found[kind][1] for found in answers)
        rows.append(
            {
                "metric": f"{kind}_cp{layout.cp}_{length_name(case.work.seq)}_us",
                "value": round(1e6 * statistics.median(slowest), 2),
                "unit": "us",
                "peer": None,
                "peer_value": None,
                "ratio": None,
                **_common(args, name, layout, case, impl),
                "bytes": size,
                "ceiling": round(1e6 * size / predicted.LINK_BYTES, 2),
                "gigabytes_per_second": round(size / statistics.median(slowest) / 1e9, 2),
            }
        )
    return rows


def _show(row: dict) -> None:
    words = [f"{row['metric']}  {row['value']}  ceiling {row['ceiling']}"]
    if row["peer"]:
        words.append(f"peer {row['peer_value']}  ratio {row['ratio']}")
    for key in (
        "predicted_ms",
        "mfu",
        "predicted_mfu",
        "tokens_per_second",
        "peak_memory_gib",
        "counted_mib",
    ):
        words += [f"{key} {row[key]}"] if key in row else []
    for key in ("estimated_mib", "nccl_ms", "peer_nccl_ms", "gigabytes_per_second"):
        words += [f"{key} {row[key]}"] if key in row else []
    print("  ".join(words), flush=True)


@one_line_errors
def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    gpus, impl = _gpus(args), _impl(args)
    cases = _chosen(args, _cases(args, gpus))
    out = args.out or (None if args.tiny else RESULTS)
    from multirank.ranks import Ranks

    ranks, started, failed = Ranks(gpus, args.limit), time.monotonic(), 0
    try:
        for name, (family, layout, seq, micro) in cases.items():
            rows_of = _exchange_rows if family == "exchanges" else _step_rows
            case = _case(args, impl, seq, micro)
            try:
                rows = rows_of(args, ranks, name, layout, case, impl)
            except AssertionError as error:  # of one case; the others have their turn
                print(f"FAIL {name}: {error}", flush=True)
                failed += 1
                rows = []
            for row in rows:
                _show(row)
            if out and rows:
                merge_rows(out, rows)
            print(f"  {time.monotonic() - started:.0f} s", flush=True)
    finally:
        ranks.close()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
