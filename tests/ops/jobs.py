"""Submits the real launch scripts with a tiny recipe on the CPU, and reads what their runs wrote."""

import json
import sys
from pathlib import Path

from cluster import Job

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "training" / "tiny.yaml"
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--mem=0", "--time=30")
STEPS = 80
FLAGS = ("--phases=dense", f"--train-iters={STEPS}", "--save-interval=20", "--eval-interval=1000")
NOT_COMPARED = {"tokens_per_second", "step_time", "mfu", "peak_memory_bytes"}


def settings(folder: Path, **others: str) -> dict[str, str]:
    """Environment of sbatch; writes `folder`/site.env unless it is there. What is not given is right."""
    values = {
        "CLSA_RUNS": str(folder / "runs"),
        "CLSA_PYTHON": sys.executable,
        "CLSA_MIN_FREE_GB": "0",
        "CLSA_GPUS_PER_NODE": "0",
    } | {name: value for name, value in others.items() if name.startswith("CLSA_")}
    env_file = folder / "site.env"
    if not env_file.exists():
        env_file.write_text("".join(f"{name}='{value}'\n" for name, value in values.items()))
    return {
        "CLSA_ROOT": str(ROOT),
        "CLSA_ENV": str(env_file),
        "CLSA_RECIPE": str(TINY),
        "MASTER_ADDR": "127.0.0.1",  # n1 is no name that resolves
        "OMP_NUM_THREADS": "1",
    } | {name: value for name, value in others.items() if not name.startswith("CLSA_")}


def submit(folder: Path, *words: str, flags: tuple = (), **others) -> Job:
    """Submit the distillation script from `folder`."""
    script = ROOT / "slurm" / "distill_clsa_7b.sh"
    return Job(script, folder, *FLAGS, *words, flags=(*TWO_NODES, *flags), **settings(folder, **others))


def metrics(folder: Path, run: str = "distill_clsa_7b") -> list[dict]:
    """The training steps of a run under `folder`."""
    path = folder / "runs" / run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [line for line in map(json.loads, lines) if "lm_loss" in line]


def at_step(job: Job, step: int, run: str = "distill_clsa_7b") -> Job:
    return job.wait(lambda: len(metrics(job.cwd, run)) >= step)


def assert_same_curve(whole: list[dict], actual: list[dict]) -> None:
    """Bitwise, but for times."""
    for expected, line in zip(whole, actual, strict=True):
        same = expected.keys() - NOT_COMPARED
        assert {key: line[key] for key in same} == {key: expected[key] for key in same}


def ranks_of(job: Job, node: str) -> list[int]:
    """Pids of the training processes of a job on a node."""
    found = []
    for pid in job.processes():
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            there = f"SLURMD_NODENAME={node}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(
                b"\0"
            )
        except OSError:
            continue
        if there and words[0].endswith(b"python") and any(word.endswith(b"distill.py") for word in words):
            found.append(pid)
    return found
