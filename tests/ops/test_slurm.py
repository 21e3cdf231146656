"""The real launch scripts on an emulated two-node cluster, with a tiny recipe on the CPU and injected faults.

Each test is a row of the fault table in docs/operations.md.
"""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from cluster import Cluster, Job, command, why_not

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "slurm" / "distill_clsa_7b.sh"
TINY = ROOT / "tests" / "training" / "tiny.yaml"
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--mem=0", "--time=30")
STEPS = 80
FLAGS = ("--phases=dense", f"--train-iters={STEPS}", "--save-interval=20", "--eval-interval=1000")
NOT_COMPARED = {"tokens_per_second", "step_time", "mfu", "peak_memory_bytes"}

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


@pytest.fixture(scope="session")
def cluster():
    with Cluster() as cluster:
        yield cluster


def submit(folder: Path, *words: str, flags: tuple = (), **settings) -> Job:
    """Submit the distillation script from `folder`; settings that are not given are right."""
    settings = {
        "CLSA_RUNS": str(folder / "runs"),
        "CLSA_PYTHON": sys.executable,
        "CLSA_MIN_FREE_GB": "0",
        "CLSA_GPUS_PER_NODE": "0",
    } | settings
    env_file = folder / "site.env"
    if not env_file.exists():
        env_file.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    env = {
        "CLSA_ROOT": str(ROOT),
        "CLSA_ENV": str(env_file),
        "CLSA_RECIPE": str(TINY),
        "MASTER_ADDR": "127.0.0.1",  # n1 is no name that resolves
        "OMP_NUM_THREADS": "1",
    }
    return Job(SCRIPT, folder, *FLAGS, *words, flags=(*TWO_NODES, *flags), **env)


def _metrics(folder: Path) -> list[dict]:
    path = folder / "runs" / "distill_clsa_7b" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


def _steps(folder: Path) -> list[dict]:
    return [line for line in _metrics(folder) if "lm_loss" in line]


def _at_step(job: Job, step: int) -> Job:
    return job.wait(lambda: len(_steps(job.cwd)) >= step)


def _assert_same_curve(whole: list[dict], folder: Path) -> None:
    for expected, actual in zip(whole, _steps(folder), strict=True):
        same = expected.keys() - NOT_COMPARED
        assert {key: actual[key] for key in same} == {key: expected[key] for key in same}


def _ranks(job: Job, node: str) -> list[int]:
    """Pids of the training processes of a job on a node."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            env = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        mine = f"SLURM_JOB_ID={job.id}".encode() in env and f"SLURMD_NODENAME={node}".encode() in env
        trains = words[0].endswith(b"python") and any(word.endswith(b"distill.py") for word in words)
        if mine and trains:
            found.append(int(folder.name))
    return found


@pytest.fixture(scope="session")
def whole_curve(cluster, tmp_path_factory):
    """Steps of a run over two nodes that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    job = submit(folder).done()
    assert job.state == "COMPLETED", job.log
    return _steps(folder)


def test_a_run_over_two_nodes_takes_every_step(whole_curve):
    assert [line["step"] for line in whole_curve] == list(range(1, STEPS + 1))


def test_a_preempted_job_goes_on_with_the_losses_of_an_unbroken_one(whole_curve, tmp_path):
    """TERM reaches the ranks, they save at the step they are at and answer 75; the script requeues."""
    job = _at_step(submit(tmp_path), 25)
    high = Job(_sleeper(tmp_path), tmp_path, flags=("-p", "high", "--exclusive", "-N2"))
    job.wait(lambda: "requeue after code 75" in job.log)
    high.done()
    job.restarted().done()
    assert job.state == "COMPLETED" and "finished" in job.log, job.log
    _assert_same_curve(whole_curve, tmp_path)
    # A log a host, with the rank before each line; the two nodes are one host here.
    logs = "".join(path.read_text() for path in tmp_path.glob(f"runs/*/logs/{job.id}/*.log"))
    assert "\n0: " in logs and "resuming at step" in logs


def _sleeper(folder: Path) -> Path:
    script = folder / "intruder.sh"
    script.write_text("#!/bin/bash\nsleep 1\n")
    return script


def test_a_cancelled_job_stays_cancelled(cluster, tmp_path):
    job = _at_step(submit(tmp_path), 5)
    command("scancel", job.id)
    job.wait(lambda: "the user or the cluster ended the job" in job.log)
    time.sleep(3)
    assert job.state == "CANCELLED" and job.field("Restarts") == "0"


@pytest.mark.slow
def test_a_killed_rank_restarts_the_job_from_its_newest_checkpoint(whole_curve, tmp_path):
    job = _at_step(submit(tmp_path), 30)
    for pid in _ranks(job, "n2"):
        os.kill(pid, signal.SIGKILL)
    job.wait(lambda: "requeue after code" in job.log)
    job.restarted().done()
    assert job.state == "COMPLETED", job.log
    _assert_same_curve(whole_curve, tmp_path)


@pytest.mark.slow
def test_a_lost_node_restarts_the_job(cluster, whole_curve, tmp_path):
    """The node's daemons die and its rank hangs: nothing answers from there any more."""
    job = _at_step(submit(tmp_path), 30)
    pid = _ranks(job, "n2")[0]
    parent = int(re.search(r"PPid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])
    os.kill(pid, signal.SIGSTOP)
    os.kill(cluster.pid("slurmd.n2"), signal.SIGKILL)
    os.kill(parent, signal.SIGKILL)
    job.wait(lambda: job.state in ("PENDING", "REQUEUED"))
    os.kill(pid, signal.SIGKILL)
    cluster.start_node("n2")
    job.restarted().done()
    assert job.state == "COMPLETED", job.log
    _assert_same_curve(whole_curve, tmp_path)


@pytest.mark.slow
def test_the_time_limit_saves_and_goes_on(whole_curve, tmp_path):
    """Slurm sends USR1 to the script some minutes ahead; here the test does."""
    job = _at_step(submit(tmp_path), 25)
    command("scancel", "--batch", "--signal=USR1", job.id)
    job.wait(lambda: "requeue after code 75" in job.log)
    job.restarted().done()
    assert job.state == "COMPLETED" and "time limit near" in job.log, job.log
    _assert_same_curve(whole_curve, tmp_path)


@pytest.mark.slow
def test_a_crash_without_progress_ends_within_the_budget(cluster, tmp_path):
    """A missing module fails every attempt before its first step: two attempts, then the end."""
    broken = tmp_path / "python"
    broken.write_text(
        f'#!/bin/bash\ncase "$*" in *distill.py*) echo "Error: broken" >&2; exit 9 ;; esac\n'
        f'exec {sys.executable} "$@"\n'
    )
    broken.chmod(0o755)
    job = submit(tmp_path, CLSA_PYTHON=str(broken), CLSA_MAX_RESTARTS="1")
    job.wait(lambda: "requeue after code 9" in job.log)
    job.restarted().done()
    assert job.state == "FAILED" and job.field("ExitCode") == "9:0"
    assert "1 restarts without a new checkpoint" in job.log


REFUSED = {
    "misspelt setting": ({"CLSA_PYTHN": "python"}, "sets CLSA_PYTHN, which nothing reads"),
    "folder that cannot be made": ({"CLSA_RUNS": "/proc/none"}, "CLSA_OUT=/proc/none/distill_clsa_7b"),
    "interpreter that is missing": ({"CLSA_PYTHON": "/none/python"}, "CLSA_PYTHON=/none/python"),
    "data that is missing": ({"CLSA_DATA": "/none/text"}, "CLSA_DATA: /none/text.idx is missing"),
    "tokenizer that is missing": ({"CLSA_TOKENIZER": "/none/t.model"}, "/none/t.model is missing"),
    "GPUs that are missing": ({"CLSA_GPUS_PER_NODE": "8"}, "GPUs where CLSA_GPUS_PER_NODE is 8"),
    "disk that is too small": ({"CLSA_MIN_FREE_GB": "9999999"}, "CLSA_MIN_FREE_GB is 9999999"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_setting_fails_the_job_at_once_in_one_line(cluster, tmp_path, name):
    settings, words = REFUSED[name]
    _assert_refused(submit(tmp_path, **settings).done(), words)


def _assert_refused(job: Job, words: str) -> None:
    errors = [line for line in job.log.splitlines() if "error: " in line]
    assert job.state == "FAILED" and job.field("ExitCode") == "2:0", job.log
    assert len(errors) == 1 and words in errors[0], job.log
    assert job.field("Restarts") == "0"


def test_settings_that_are_no_shell_fail_the_job_at_once_in_one_line(cluster, tmp_path):
    (tmp_path / "site.env").write_text("CLSA_RUNS='/unclosed\n")
    _assert_refused(submit(tmp_path).done(), "CLSA_ENV is not valid shell")


def test_a_flag_that_the_trainer_refuses_fails_the_job_at_once_in_one_line(cluster, tmp_path):
    job = submit(tmp_path, "--index-topk=65").done()
    _assert_refused(job, "--index-topk 65")


def test_no_setting_of_the_environment_reaches_a_file(cluster, tmp_path):
    """Keys are in the environment of most jobs; launchers like to print it."""
    job = submit(tmp_path, "--index-topk=65", WANDB_API_KEY="canary-7f3a").done()
    (tmp_path / "site.env").unlink()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert job.log and not [path for path in written if b"canary-7f3a" in path.read_bytes()]
