"""What a run shows while it runs: its lines, TensorBoard, wandb without its key, a profiler's trace."""

import gzip
import json
import os
import re
import subprocess
from argparse import Namespace
from importlib.util import find_spec

import pytest
from runs import ENVIRONMENT, command

from megatron_clsa.training.progress import Progress, place_writers

KEY = "0123456789abcdef0123456789abcdef01234567"
LINE = re.compile(
    r"^step \d+ \| dense \d+/10 \| loss \d\.\d{4} \| coverage 0\.\d{3} \| grad norm \S+ \| [\d,]+ tokens/s"
    r" \| MFU \d+\.\d% \| 0:00:\d\d left$",
    re.M,
)
wandb = pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run with everything on: (its folder, what it printed)."""
    out = tmp_path_factory.mktemp("watched")
    flags = ["--phases=dense", "--profile", "--profile-step-start=3", "--profile-step-end=5"]
    flags += ["--peak-tflops=1", f"--tensorboard-dir={out}/tensorboard"]
    if find_spec("wandb") is not None:
        flags += ["--wandb-project=tests", "--wandb-exp-name=tiny"]
    environment = ENVIRONMENT | {"WANDB_MODE": "offline", "WANDB_API_KEY": KEY}
    words = command(out, *flags)
    result = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return out, result.stdout + result.stderr


def test_one_line_a_step_and_none_of_megatrons(watched):
    _, text = watched
    assert len(LINE.findall(text)) == 10, text[-3000:]
    assert "elapsed time per iteration" not in text and "Theoretical memory" not in text
    assert len(re.findall(r"^evaluation at step \d+ dense \| valid_lm_loss \d", text, re.M)) == 2


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="TensorBoard is not installed")
def test_tensorboard_holds_megatrons_figures_and_ours(watched):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(watched[0] / "tensorboard" / "01_dense" / "log"))
    events.Reload()
    names = set(events.Tags()["scalars"])
    assert {"lm loss", "learning-rate", "clsa/attention_coverage", "clsa/tokens_per_second"} <= names
    assert [event.step for event in events.Scalars("clsa/lm_loss")] == list(range(1, 11))


def test_profile_writes_a_trace(watched):
    trace = watched[0] / "tensorboard" / "01_dense" / "torch_profile" / "rank-0.json.gz"
    with gzip.open(trace) as file:
        assert json.load(file)["traceEvents"]


@wandb
def test_wandb_runs_offline_and_its_key_is_written_nowhere(watched):
    out, text = watched
    (record,) = (out / "wandb").rglob("*.wandb")
    assert record.stem == f"run-{(out / 'wandb' / '01_dense.id').read_text()}"
    assert KEY not in text
    assert not [path for path in out.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_a_phase_is_one_wandb_run_however_often_it_starts(tmp_path, monkeypatch):
    def identity(phase: str) -> str:
        flags = dict(
            profile=False, tensorboard_dir=None, wandb_project="p", wandb_exp_name="", wandb_save_dir=""
        )
        place_writers(Namespace(**flags, rank=0, world_size=1), phase, str(tmp_path))
        return os.environ["WANDB_RUN_ID"]

    monkeypatch.setenv("WANDB_RUN_ID", "")
    monkeypatch.setenv("WANDB_RESUME", "")
    first, other = identity("01_dense"), identity("02_sparse")
    assert identity("01_dense") == first != other


def test_time_left_follows_the_steps_of_the_phase():
    progress = Progress(total_steps=100, log_interval=1)
    record = dict(step=40, phase="p", phase_step=40, lm_loss=1.0, kd_loss=None, grad_norm=None)
    record |= dict(tokens_per_second=10.0, step_time=60.0, mfu=None, peak_memory_bytes=0)
    progress.step(record)
    assert progress.line(record).endswith("| 1:00:00 left")
