"""Runs on an emulated two-node cluster, with faults injected: each test is a row of docs/operations.md."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import Job, command
from jobs import (
    FLAGS,
    ROOT,
    STEPS,
    TWO_NODES,
    assert_same_curve,
    at_step,
    metrics,
    ranks_of,
    settings,
    submit,
)


def test_a_run_over_two_nodes_takes_every_step(whole_curve):
    assert [line["step"] for line in whole_curve] == list(range(1, STEPS + 1))


def test_a_preempted_job_goes_on_with_the_losses_of_an_unbroken_one(whole_curve, tmp_path):
    """TERM reaches the ranks and their data workers; they save at the step they are at and answer 75."""
    job = at_step(submit(tmp_path, "--num-workers=1"), 25)
    high = Job(_sleeper(tmp_path), tmp_path, flags=("-p", "high", "--exclusive", "-N2"))
    job.wait(lambda: "requeue after code 75" in job.log)
    high.done()
    job.restarted().done()
    assert job.state == "COMPLETED" and "finished" in job.log, job.log
    assert_same_curve(whole_curve, metrics(tmp_path))
    # A log a host, with the rank before each line; the two nodes are one host here.
    logs = "".join(path.read_text() for path in tmp_path.glob(f"runs/*/logs/{job.id}/*/*.log"))
    assert "\n0: " in logs and "resuming at step" in logs


def _sleeper(folder: Path) -> Path:
    script = folder / "intruder.sh"
    script.write_text("#!/bin/bash\nsleep 1\n")
    return script


def test_a_cancelled_job_stays_cancelled(cluster, tmp_path):
    job = at_step(submit(tmp_path), 5)
    command("scancel", job.id)
    job.wait(lambda: "the user or the cluster ended the job" in job.log)
    time.sleep(3)
    assert job.state == "CANCELLED" and job.field("Restarts") == "0"


@pytest.mark.slow
def test_a_killed_rank_restarts_the_job_from_its_newest_checkpoint(whole_curve, tmp_path):
    job = at_step(submit(tmp_path), 30)
    for pid in ranks_of(job, "n2"):
        os.kill(pid, signal.SIGKILL)
    job.wait(lambda: "requeue after code" in job.log)
    job.restarted().done()
    assert job.state == "COMPLETED", job.log
    assert_same_curve(whole_curve, metrics(tmp_path))


@pytest.mark.slow
def test_a_lost_node_restarts_the_job(cluster, whole_curve, tmp_path):
    """The node's daemons die and its rank hangs: nothing answers from there any more."""
    job = at_step(submit(tmp_path), 30)
    pid = ranks_of(job, "n2")[0]
    parent = int(re.search(r"PPid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])
    os.kill(pid, signal.SIGSTOP)
    os.kill(cluster.pid("slurmd.n2"), signal.SIGKILL)
    try:
        os.kill(parent, signal.SIGKILL)
        job.wait(lambda: job.state in ("PENDING", "REQUEUED"))
        with contextlib.suppress(
            ProcessLookupError
        ):  # the kernel ends stopped orphans, if they have no group
            os.kill(pid, signal.SIGKILL)
    finally:
        cluster.start_node("n2")
    job.restarted().done()
    assert job.state == "COMPLETED", job.log
    assert_same_curve(whole_curve, metrics(tmp_path))


@pytest.mark.slow
def test_the_time_limit_saves_and_goes_on(whole_curve, tmp_path):
    """Slurm sends USR1 to the script some minutes ahead; here the test does."""
    job = at_step(submit(tmp_path), 25)
    command("scancel", "--batch", "--signal=USR1", job.id)
    job.wait(lambda: "requeue after code 75" in job.log)
    job.restarted().done()
    assert job.state == "COMPLETED" and "time limit near" in job.log, job.log
    assert_same_curve(whole_curve, metrics(tmp_path))


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


@pytest.mark.slow
def test_a_chain_of_pretraining_jobs_goes_on_where_the_one_before_ended(whole_curve, tmp_path):
    """Where no requeue is allowed: the first job is told of its time limit, the second ends the run."""
    env = settings(tmp_path, CLSA_REQUEUE="0")
    script = str(ROOT / "slurm" / "pretrain_clsa_7b.sh")
    words = [str(ROOT / "slurm" / "chain.sh"), "2", "--parsable", *TWO_NODES, script, *FLAGS]
    made = subprocess.run(
        words, cwd=tmp_path, env=os.environ | env, capture_output=True, text=True, check=True
    )
    first, second = (Job.of(number, tmp_path) for number in made.stdout.split())
    at_step(first, 25, "pretrain_clsa_7b")
    assert second.state == "PENDING"
    command("scancel", "--batch", "--signal=USR1", first.id)
    assert first.done().field("ExitCode") == "75:0" and "CLSA_REQUEUE=0" in first.log, first.log
    assert second.done().state == "COMPLETED", second.log
    assert_same_curve(whole_curve, metrics(tmp_path, "pretrain_clsa_7b"))


@pytest.mark.slow
def test_a_run_is_converted_for_hugging_face_and_its_logits_compared(whole_curve, tmp_path):
    submit(tmp_path, "--train-iters=2").done()
    script = ROOT / "slurm" / "convert_to_hf.sh"
    words = [str(tmp_path / "runs" / "distill_clsa_7b"), str(tmp_path / "with space")]
    job = Job(script, tmp_path, *words, flags=("--mem=0",), **settings(tmp_path)).done()
    assert job.state == "COMPLETED" and (tmp_path / "with space" / "config.json").is_file(), job.log
    assert "logits" in job.log


@pytest.mark.parametrize("words", [[], ["0", __file__], ["two", __file__], ["2", "nothing.sh"]])
def test_a_chain_that_is_none_is_refused(words):
    result = subprocess.run([ROOT / "slurm" / "chain.sh", *words], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("error: usage")
    assert result.stderr.count("\n") == 1
