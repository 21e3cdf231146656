"""Time the kernels and their peers on this machine and write docs/results/kernels.json; see --help."""

import importlib
import math
import pkgutil
import shlex
import sys
import time
import traceback

import bench
import torch
from bench.harness import FAMILIES, Settings, measure, merge_rows

from megatron_clsa.errors import OneLineParser, UserError, one_line_errors
from megatron_clsa.places import chosen_device

SECONDS = 0.2


def _load_families() -> None:
    """Import every module of tools/bench: each registers its family."""
    for module in pkgutil.iter_modules(bench.__path__):
        importlib.import_module(f"bench.{module.name}")


def _parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="FAMILY", help=f"of {', '.join(sorted(FAMILIES))} (all)")
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192, 32768, 131072], metavar="TOKENS")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="timed seconds a side of a case (0.2)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (a GPU, if there is one)")
    parser.add_argument("--out", default="docs/results/kernels.json", help="rows of other metrics stay")
    return parser


def _show(row: dict) -> None:
    peer = f"{row['peer']} {row['peer_value']}  ratio {row['ratio']}" if row["peer"] else "no peer"
    memory = f"  peak {row['peak_memory_mib']} MiB" if row["peak_memory_mib"] is not None else ""
    alone = f"  alone {row['alone']}" if "alone" in row else ""
    print(f"{row['metric']}  {row['value']}  ({peer}; ceiling {row['ceiling']}){alone}{memory}", flush=True)


def _command(args) -> str:
    """The command that repeats the figures, without the paths of this machine."""
    lengths = [str(length) for length in args.lengths]
    words = ["--only", *args.only] if args.only else []
    words += ["--lengths", *lengths]
    words += ["--seconds", f"{args.seconds:g}"] if args.seconds != SECONDS else []
    return shlex.join(["python", "tools/bench_kernels.py", *words])


def _check(args, names: list[str]) -> torch.device:
    """The device; whatever can be refused is refused here, before the first case is timed."""
    if unknown := [name for name in names if name not in FAMILIES]:
        raise UserError(f"--only {unknown[0]} is no family; choose from {', '.join(sorted(FAMILIES))}")
    if wrong := [length for length in args.lengths if length < 1]:
        raise UserError(f"--lengths {wrong[0]}: give positive numbers of tokens")
    if not 0 < args.seconds < math.inf:
        raise UserError(f"--seconds {args.seconds}: give a positive number")
    device = chosen_device(args.device)
    try:
        merge_rows(args.out, [])  # as after each case: rows read, folder made, file written
    except OSError as error:
        raise UserError(f"--out {args.out} cannot be written: {error.strerror}; give a file") from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"--out {args.out} holds something else than rows: give another file") from error
    return device


def _measured(name: str, settings: Settings, command: str, out: str) -> bool:
    """Whether all rows of a family were written; a case that raises costs the family's later rows only."""
    begin = time.perf_counter()
    try:
        for case in FAMILIES[name](settings):
            rows = measure(case, settings, command)
            for row in rows:
                _show(row)
            merge_rows(out, rows)
    except Exception:
        traceback.print_exc()
        print(f"family {name} stopped early: see above", flush=True)
        return False
    print(f"family {name}: {time.perf_counter() - begin:.0f} s", flush=True)
    return True


@one_line_errors
def main() -> int:
    _load_families()
    args = _parser().parse_args()
    names = args.only or sorted(FAMILIES)
    settings = Settings(tuple(args.lengths), args.seconds, _check(args, names))
    command = _command(args)
    failed = [name for name in names if not _measured(name, settings, command, args.out)]
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
