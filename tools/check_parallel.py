"""Hold every combination of TP, PP, CP and DP of a host's ranks to one process; see --help.

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
from megatron_clsa.errors import UserError, one_line_errors

RANKS = (2, 4, 8)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, help="2, 4 or 8; under torchrun its own number")
    parser.add_argument("--layouts", nargs="+", metavar="NAME", help="as tp2_cp2 or pp2_vpp2_dp2 (all)")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="of dense, sparse, warmup (all)")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="bf16 on GPUs, fp32 otherwise")
    parser.add_argument("--no-resume", action="store_true", help="leave out resume and reshard")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
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
        raise UserError(f"--ranks {world or 'is missing'}: choose 2, 4 or 8, or start with torchrun")
    if torch.cuda.is_available() and torch.cuda.device_count() < world:
        raise UserError(
            f"--ranks {world} needs as many GPUs, here are {torch.cuda.device_count()}; ask for fewer, or "
            "hide the GPUs with CUDA_VISIBLE_DEVICES= to check over gloo"
        )
    return world


def _finish(rows: list[dict], path: str | None, setting: dict) -> None:
    passed = sum(row["ok"] for row in rows)
    print(
        f"{passed} of {len(rows)} rows equal one process;",
        *(f"{k} {v}," for k, v in setting.items()),
        end=" ",
    )
    if path:
        with open(path, "w") as file:
            json.dump(setting | {"rows": rows}, file, indent=1)


def _show(row: dict) -> None:
    if "error" in row:
        print(f"FAIL {row['layout']:<16} {row['error']}", flush=True)
        return
    gradient = (
        f"gradient {row['gradient_error']:.1e} <= {row['gradient_limit']:.1e}  index {row['index']}"
        if "gradient_error" in row
        else ""
    )
    verdict = "ok  " if row["ok"] else "FAIL"
    loss = f"loss {row['loss_error']:.1e} <= {row['loss_limit']:.1e}"
    print(f"{verdict} {row['layout']:<16} {row['case']:<24} {loss}  {gradient}", flush=True)


def _rows(ranks, layouts, cases, folder: str, resume: bool):
    from multirank import check

    expected = check.expected_of(ranks, cases, folder)
    for name, layout in layouts.items():
        try:
            yield from check.check_layout(ranks, name, layout, cases, expected, folder)
        except AssertionError as error:  # a rank's traceback: the other layouts still have their turn
            yield {"layout": name, "case": "all", "ok": False, "error": str(error)}
    if resume:
        yield from check.check_resume(ranks, layouts, check.most_trained(cases), folder)


@one_line_errors
def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    world = _world(args.ranks)
    from multirank import check
    from multirank.ranks import ranks_of

    known = check.layouts_of(world)
    layouts = {name: known[name] for name in _chosen("--layouts", args.layouts, list(known))}
    dtype = args.dtype or ("bf16" if torch.cuda.is_available() else "fp32")
    cases = check.cases_of(world, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    names = _chosen("--cases", args.cases, [case.name for case in cases])
    cases = [case for case in cases if case.name in names]
    if args.json and not os.path.isdir(os.path.dirname(os.path.abspath(args.json))):
        raise UserError(f"--json {args.json}: its folder does not exist; make it first")
    ranks, started, rows = ranks_of(world), time.monotonic(), []
    with tempfile.TemporaryDirectory() as own:
        for row in _rows(ranks, layouts, cases, ranks.shared_folder(own), not args.no_resume):
            rows.append(row)
            if ranks.chief:
                _show(row)
    if ranks.chief:
        _finish(rows, args.json, {"ranks": world, "backend": ranks.backend, "dtype": dtype})
        print(f"{time.monotonic() - started:.0f} s")
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
