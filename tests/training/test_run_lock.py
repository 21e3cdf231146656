"""Two jobs on one run's folder: the second is refused in one line, a dead job's hold is taken over."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from runs import ENVIRONMENT, command, distill, steps

from megatron_clsa.errors import UserError
from megatron_clsa.training import run_lock
from megatron_clsa.training.run_lock import RunLock, one_writer


def _hold(folder: Path, **fields) -> Path:
    """A lock as somebody else's process has left it."""
    path = folder / run_lock.NAME
    path.write_text(json.dumps(run_lock._this_process() | {"token": "theirs"} | fields))
    return path


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(run_lock, "_DEAD_SECONDS", 0.5)
    monkeypatch.setattr(run_lock, "_SETTLE_SECONDS", 0.05)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def test_a_second_job_is_refused_in_one_line_and_the_first_goes_on(tmp_path):
    words = command(tmp_path, "--phases", "dense", "--train-iters", "5000", "--eval-interval", "9000")
    first = subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "metrics.jsonl").is_file():
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        second = distill(tmp_path, "--phases", "dense")
        errors = [line for line in second.stderr.splitlines() if "error" in line.lower()]
        assert second.returncode == 2 and len(errors) == 1, second.stderr[-3000:]
        assert f"process {first.pid} on " in errors[0] and "another --out" in errors[0]
        first.terminate()
        assert first.wait(timeout=60) == 75
        assert [line["step"] for line in steps(tmp_path)] == list(range(1, len(steps(tmp_path)) + 1))
    finally:
        first.kill()
    assert not (tmp_path / run_lock.NAME).exists()


def test_the_hold_of_a_killed_process_of_this_machine_is_taken_at_once(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    _hold(tmp_path, pid=ended.pid)
    started = time.monotonic()
    lock = RunLock(tmp_path)
    lock.take()
    assert time.monotonic() - started < 10
    lock.release()


def test_a_process_number_that_came_again_is_no_holder(tmp_path, quick):
    _hold(tmp_path, pid=os.getpid(), started="1")
    RunLock(tmp_path).take()


def test_a_job_that_died_on_another_host_is_told_by_its_stamp(tmp_path, quick):
    _hold(tmp_path, host="n7", machine="another")
    RunLock(tmp_path).take()


def test_a_job_that_lives_on_another_host_is_named(tmp_path, quick):
    path = _hold(tmp_path, host="n7", machine="another", job="12 restart 0")
    ended = threading.Event()

    def live():
        while not ended.wait(0.05):
            os.utime(path)

    holder = threading.Thread(target=live)
    holder.start()
    try:
        with pytest.raises(UserError, match=r"on n7 \(Slurm job 12 restart 0\) is writing this run"):
            RunLock(tmp_path).take()
    finally:
        ended.set()
        holder.join()


def test_a_requeued_job_does_not_wait_for_what_it_was_before(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(run_lock, "_DEAD_SECONDS", 1000.0)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    _hold(tmp_path, host="n7", machine="another", job="12 restart 0")
    RunLock(tmp_path).take()


@pytest.mark.parametrize("content", ["", "garbage", "{}"])
def test_a_lock_that_a_kill_cut_short_holds_nothing(tmp_path, quick, content):
    (tmp_path / run_lock.NAME).write_text(content)
    RunLock(tmp_path).take()


def test_of_two_jobs_that_find_the_same_dead_hold_one_goes_on(tmp_path, quick):
    _hold(tmp_path, host="n7", machine="another")
    outcomes: list[str] = []

    def take():
        try:
            RunLock(tmp_path).take()
            outcomes.append("held")
        except UserError:
            outcomes.append("refused")

    jobs = [threading.Thread(target=take) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert sorted(outcomes) == ["held", "refused"]


def test_every_rank_is_told(tmp_path):
    """The lock of a living process: this one."""
    _hold(tmp_path)
    store, refused = dist.HashStore(), []

    def rank(number: int):
        with pytest.raises(UserError, match="is writing this run"), one_writer(tmp_path, store, number, 3):
            pass
        refused.append(number)

    ranks = [threading.Thread(target=rank, args=(number,)) for number in range(3)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join(30)
    assert sorted(refused) == [0, 1, 2]
