"""Hold every combination of TP, PP, CP and DP of a host's ranks to one process on the CPU; see --help.

Owns the command line and the table. NCCL and bf16 where each rank has a GPU, gloo and fp32 otherwise.

    python tools/check_parallel.py --ranks 4
    torchrun --nproc-per-node 8 tools/check_parallel.py --json parallel.json
"""

import argparse
import json
import os
import sys
import tempfile
import time

import torch

import megatron_clsa.parallel.cpu  # noqa: F401
from megatron_clsa.errors import OneLineParser, UserError, one_line_errors

RANKS = (1, 2, 4, 8)
IMPLS = ["local", "transformer_engine"]


def _parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, help="1, 2, 4 or 8; under torchrun its own number")
    parser.add_argument("--layouts", nargs="+", metavar="NAME", help="as tp2_cp2 or pp2_vpp2_dp2 (all)")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="of dense, sparse, warmup (all)")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="bf16 on GPUs, fp32 otherwise")
    parser.add_argument("--impl", choices=IMPLS, help="transformer_engine where it can be used, else local")
    parser.add_argument("--no-resume", action="store_true", help="leave out resume and reshard")
    parser.add_argument("--limit", type=float, help="seconds that a layout may take (240; 120 on GPUs)")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, each as it is known")
    return parser


def _chosen(flag: str, names: list[str] | None, known: list[str]) -> list[str]:
    if unknown := [name for name in names or [] if name not in known]:
        raise UserError(f"{flag} {unknown[0]} is not there; choose from {', '.join(known)}")
    return names or known


def _world(asked: int | None) -> int:
    started = os.environ.get("WORLD_SIZE") if "TORCHELASTIC_RUN_ID" in os.environ else None
    if started and asked and asked != int(started):
        raise UserError(f"--ranks {asked} differs from torchrun's {started} ranks; leave it out")
    world = int(started or asked or 0)
    if world not in RANKS:
        raise UserError(f"--ranks {world or 'is missing'}: choose 1, 2, 4 or 8, or start with torchrun")
    if torch.cuda.is_available() and torch.cuda.device_count() < world:
        raise UserError(
            f"--ranks {world} needs as many GPUs, here are {torch.cuda.device_count()}; ask for fewer, or "
            "hide the GPUs with CUDA_VISIBLE_DEVICES= to check over gloo"
        )
    return world


def _impl(asked: str | None) -> str:
    from megatron_clsa.training.arguments import have_transformer_engine

    usable = torch.cuda.is_available() and have_transformer_engine()
    if asked == "transformer_engine" and not usable:
        raise UserError("--impl transformer_engine needs a GPU and Transformer Engine; leave the flag out")
    return asked or IMPLS[usable]


def _write(rows: list[dict], path: str | None, setting: dict) -> None:
    if path:
        with open(path, "w") as file:
            json.dump(setting | {"rows": rows}, file, indent=1)


TABLE = "{:<5}{:<16} {:<24} {:>8} {:>8}  {:>8} {:>8}  {}"


def _head() -> None:
    """Errors are relative, each beside its limit."""
    print(TABLE.format("", "layout", "case", "loss", "limit", "gradient", "limit", "index"), flush=True)


def _show(row: dict) -> None:
    verdict = "ok" if row["ok"] else "FAIL"
    if "error" in row:
        print(f"{verdict:<5}{row['layout']:<16} {row['case']:<24} {row['error']}", flush=True)
        return
    keys = "loss_error", "loss_limit", "gradient_error", "gradient_limit"
    figures = [f"{row[key]:.1e}" if key in row else "-" for key in keys]
    print(TABLE.format(verdict, row["layout"], row["case"], *figures, row.get("index", "-")), flush=True)


@one_line_errors
def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    world = _world(args.ranks)
    if int(os.environ.get("RANK", 0)) and "TORCHELASTIC_RUN_ID" in os.environ:
        return (
            0  # torchrun's first process starts a rank of its own for each GPU, whom it can end if it hangs
        )
    from multirank.ranks import LIMIT, Ranks, backend_for

    on_gpu = torch.cuda.is_available()
    ranks = Ranks(world, args.limit or (120.0 if on_gpu else LIMIT))
    if on_gpu:
        ranks.start()  # they import what this process imports now, at the same time
    try:
        return _run(args, world, ranks, backend_for(world), on_gpu)
    finally:
        ranks.close()


def _run(args, world: int, ranks, backend: str, on_gpu: bool) -> int:
    from multirank import check

    known = check.layouts_of(world)
    layouts = {name: known[name] for name in _chosen("--layouts", args.layouts, list(known))}
    impl = _impl(args.impl)
    dtype = args.dtype or ("bf16" if on_gpu else "fp32")
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    cases = check.cases_of(world, torch_dtype, impl, check.SMALL if on_gpu else check.TINY)
    names = _chosen("--cases", args.cases, [case.name for case in cases])
    cases = [case for case in cases if case.name in names]
    if args.json and not os.path.isdir(os.path.dirname(os.path.abspath(args.json))):
        raise UserError(f"--json {args.json}: its folder does not exist; make it first")
    _head()
    setting = {"ranks": world, "backend": backend, "dtype": dtype, "impl": impl}
    started, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        ranks.start()
        for row in check.check_layouts(ranks, layouts, cases, folder, not args.no_resume):
            rows.append(row | {"at": round(time.monotonic() - started, 1)})
            _show(row)
            _write(rows, args.json, setting)
    passed = sum(row["ok"] for row in rows)
    words = ", ".join(f"{key} {value}" for key, value in setting.items())
    print(f"{passed} of {len(rows)} rows equal one process; {words}, {time.monotonic() - started:.0f} s")
    return 0 if passed == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
