"""Starts `examples/distill.py` as a user does, on gloo ranks of this machine."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = Path(__file__).parent / "tiny.yaml"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def distill(out: Path, *flags: str, ranks: int = 1, recipe: Path = TINY) -> subprocess.CompletedProcess:
    """Run it to its end; the caller looks at `returncode`, `stderr` and the files in `out`."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={_free_port()}"]
    script = [str(ROOT / "examples" / "distill.py"), "--config", str(recipe), "--out", str(out), *flags]
    return subprocess.run(
        [sys.executable, *(launcher if ranks > 1 else []), *script],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
