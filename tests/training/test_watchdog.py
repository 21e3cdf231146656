"""What ends a run that cannot go on: a rank that hangs is named, and so is the flag that saves memory."""

import json
import os
import signal
import subprocess
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from runs import ENVIRONMENT, command, steps

from megatron_clsa.training.watchdog import Watchdog, memory_advice

LONG = ["--phases", "dense", "--train-iters", "2000", "--eval-interval", "5000"]


def _ranks_of(launcher: int) -> dict[int, int]:
    """Rank -> pid of a launcher's children."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    environments = {int(pid): Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children}
    return {int(v[5:]): pid for pid, env in environments.items() for v in env if v.startswith(b"RANK=")}


@pytest.mark.parametrize("stopped", [1, 0])
def test_a_stopped_rank_is_named_and_the_run_ends(tmp_path, stopped):
    """Rank 0 keeps the store that the others would ask."""
    words = command(tmp_path, *LONG, "--hang-timeout", "300", ranks=2)
    words[1] = str(Path(__file__).parent / "hung_run.py")
    run = subprocess.Popen(
        words, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "metrics.jsonl").is_file() or len(steps(tmp_path)) < 4:
            assert time.monotonic() < deadline and run.poll() is None, run.stderr.read()[-3000:]
            time.sleep(0.1)
        os.kill(_ranks_of(run.pid)[stopped], signal.SIGSTOP)
        _, stderr = run.communicate(timeout=150)
    finally:
        run.kill()
    assert run.returncode == 1
    line = next(line for line in stderr.splitlines() if line.startswith("error: HANG"))
    assert f": rank {stopped}" in line and "most recent call first" in stderr


def _watchdog(store: dist.Store, rank: int = 0) -> Watchdog:
    watchdog = Watchdog(store, rank, 3, timeout=10)
    watchdog.earlier = {}
    return watchdog


def _state(**fields) -> str:
    return json.dumps({"pulse": 3, "step": 7, "waits": True, "place": "wait at c10d.py:1"} | fields)


@pytest.fixture
def store(tmp_path) -> dist.Store:
    store = dist.FileStore(str(tmp_path / "store"), -1)
    store.set_timeout(timedelta(seconds=2))
    for rank in range(3):
        store.set(f"watchdog/{rank}", _state())
    return store


def test_the_rank_that_waits_for_nobody_is_named_with_its_place(store):
    store.set("watchdog/2", _state(waits=False, place="read at corpus.py:40"))
    line = _watchdog(store).report()
    assert "rank 2 is after step 7, in read at corpus.py:40" in line and "rank 1" not in line


def test_a_silent_rank_is_named_with_its_last_place(store):
    watchdog = _watchdog(store)
    watchdog.look(watchdog.earlier)
    store.set("watchdog/2", _state(pulse=4))
    line = watchdog.report()
    assert "rank 1 has fallen silent after step 7" in line and "rank 2" not in line


def test_a_rank_without_a_pulse_yet_hides_nobody(store):
    store.delete_key("watchdog/1")
    watchdog = _watchdog(store)
    watchdog.look(watchdog.earlier)
    line = watchdog.report()
    assert "rank 1 never answered" in line and "rank 2" not in line


def test_steps_keep_the_watchdog_quiet(store, monkeypatch):
    ended = threading.Event()
    watchdog = Watchdog(store, 0, 3, timeout=1.5)  # a busy machine may stand still for most of it
    monkeypatch.setattr(watchdog, "_end", lambda: ended.set() or watchdog.stopping.set())
    watchdog.start()
    started = time.monotonic()
    while time.monotonic() < started + 2:
        watchdog.beat(1)
        time.sleep(0.02)
    assert not ended.is_set()
    assert ended.wait(20)


def test_a_lack_of_memory_names_the_flags_that_need_less():
    line = memory_advice(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"), 3)
    assert "\n" not in line and line.startswith("error: rank 3 ran out of GPU memory: CUDA out of memory.")
    assert "--micro-batch-size" in line and "--recompute-granularity" in line
