"""Time the candidate configurations of a kernel side by side and check each against the first; see --help.

Every candidate compiles, runs and is checked in a process of its own, all at once: one that hangs or crashes
costs the others nothing. Then they are timed one after the other. The candidates are in `tune/`.
"""

import argparse
import json
import os
import select
import subprocess
import sys
import time

import torch
from bench.harness import time_together
from tune import CASES, Case

from megatron_clsa.errors import OneLineParser, UserError, one_line_errors

SECONDS = 0.5  # timed, a candidate


def _parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("case", choices=sorted(CASES))
    parser.add_argument("--length", type=int, default=32768, metavar="TOKENS")
    parser.add_argument("--only", nargs="+", metavar="CANDIDATE", help="candidates beside the first (all)")
    parser.add_argument(
        "--patience", type=float, default=90.0, metavar="SECONDS", help="to compile and check"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--candidate", help=argparse.SUPPRESS)
    return parser


def _kernel_times(call, device: torch.device) -> dict[str, float]:
    """Milliseconds of each kernel of one call."""
    if device.type != "cuda":
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = [event for event in profile.key_averages() if event.device_time_total > 0]
    events.sort(key=lambda event: -event.device_time_total)
    return {event.key[:40]: round(event.device_time_total / 1e3, 3) for event in events[:8]}


def _run_candidate(case: Case, name: str, device: torch.device) -> None:
    """The child's side: check, say so, wait for the turn, time."""
    with case.configured(next(iter(case.candidates))):
        expected = case.result()
    with case.configured(name):
        error = case.difference(case.result(), expected)
        print(json.dumps({"error": error}), flush=True)
        del expected
        sys.stdin.readline()
        milliseconds = time_together({name: case.call}, device, SECONDS)[name]
        print(json.dumps({"ms": milliseconds, "kernels": _kernel_times(case.call, device)}), flush=True)


def _start(name: str) -> subprocess.Popen:
    command = [sys.executable, *sys.argv, "--candidate", name]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _answer(child: subprocess.Popen, deadline: float) -> dict | None:
    """The child's next line; None if it ended or the time is over, after which it does not run any more."""
    ready, _, _ = select.select([child.stdout], [], [], max(deadline - time.monotonic(), 0.0))
    line = child.stdout.readline() if ready else ""
    if not line:
        child.kill()
        return None
    return json.loads(line)


def _compare(names: list[str], patience: float) -> None:
    """The parent's side: all candidates compile and check at once, then take turns."""
    deadline = time.monotonic() + patience
    children = {name: _start(name) for name in names}
    checked = {name: _answer(child, deadline) for name, child in children.items()}
    for name, child in children.items():
        if checked[name] is None:
            print(f"{name:28} failed or took more than {patience:.0f} s", flush=True)
            continue
        child.stdin.write("go\n")
        child.stdin.flush()
        timed = _answer(child, time.monotonic() + 30.0)
        figures = f"{timed['ms']:8.3f} ms  {timed['kernels']}" if timed else "not timed"
        print(f"{name:28} difference {checked[name]['error']}  {figures}", flush=True)
        child.wait()


@one_line_errors
def main() -> None:
    args = _parser().parse_args()
    device = torch.device(args.device)
    case = CASES[args.case](args.length, device)
    if args.candidate:
        case.draw()
        return _run_candidate(case, args.candidate, device)
    names = list(case.candidates)
    if unknown := [name for name in args.only or [] if name not in names]:
        raise UserError(f"--only {unknown[0]} is no candidate; choose from {', '.join(names)}")
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    _compare(names[:1] + [n for n in names[1:] if not args.only or n in args.only], args.patience)


if __name__ == "__main__":
    sys.exit(main())
