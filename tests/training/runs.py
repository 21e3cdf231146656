"""Starts `examples/distill.py` as a user does, on gloo ranks of this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = Path(__file__).parent / "tiny.yaml"
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
}


def command(out: Path, *flags: str, ranks: int = 1, recipe: Path = TINY) -> list[str]:
    start = ["--nproc-per-node", str(ranks)] if ranks > 1 else []
    script = str(ROOT / "examples" / "distill.py")
    return [sys.executable, script, *start, "--config", str(recipe), "--out", str(out), *flags]


def run(words: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)


def distill(out: Path, *flags: str, ranks: int = 1, recipe: Path = TINY) -> subprocess.CompletedProcess:
    """Run it to its end; the caller looks at `returncode`, `stderr` and the files in `out`."""
    return run(command(out, *flags, ranks=ranks, recipe=recipe))


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def steps(out: Path) -> list[dict]:
    """The lines of training steps, without the evaluations'."""
    return [line for line in metrics(out) if "lm_loss" in line]
