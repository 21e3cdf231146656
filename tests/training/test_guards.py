"""A step that goes wrong on one rank: every rank stops, skips or rolls back alike."""

import subprocess
import sys
from pathlib import Path

import pytest
from runs import ENVIRONMENT, TINY, steps

from megatron_clsa.training.guards import WARM_UP, RecentMean

NAN_RUN = Path(__file__).parent / "nan_run.py"
BAD_STEP = 5  # of two microbatches a rank


def _poisoned_run(out: Path, *flags: str, factor: str = "nan") -> subprocess.CompletedProcess:
    """Ten steps on two data-parallel ranks; rank 1 spoils the first microbatch of step 5."""
    poison = {"NAN_RANK": "1", "NAN_CALL": str(2 * BAD_STEP - 1), "NAN_FACTOR": factor}
    words = ["--nproc-per-node=2", "--config", str(TINY), "--out", str(out), "--phases=dense", *flags]
    return subprocess.run(
        [sys.executable, str(NAN_RUN), *words],
        env=ENVIRONMENT | poison,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_by_default_the_run_stops_with_one_line_that_names_step_and_rank(tmp_path):
    result = _poisoned_run(tmp_path)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1
    assert len(errors) == 1 and "step 5" in errors[0] and "rank 1" in errors[0], result.stderr[-2000:]
    assert [line["step"] for line in steps(tmp_path)] == [1, 2, 3, 4]


def test_skip_leaves_the_update_out_and_goes_on(tmp_path):
    result = _poisoned_run(tmp_path, "--on-nan=skip")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "WARNING: step 5" in result.stderr and "its update is skipped" in result.stderr
    losses = {line["step"]: line["lm_loss"] for line in steps(tmp_path)}
    assert losses.pop(BAD_STEP) is None
    assert sorted(losses) == [1, 2, 3, 4, 6, 7, 8, 9, 10] and None not in losses.values()


def test_roll_back_goes_on_from_the_checkpoint_without_the_data_of_the_step(tmp_path):
    result = _poisoned_run(tmp_path, "--on-nan=rollback", "--save-interval=3")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "back to the newest checkpoint" in result.stderr
    assert "resuming at step 3" in result.stdout
    assert [line["step"] for line in steps(tmp_path)] == [1, 2, 3, 4, 6, 7, 8, 9, 10]


def test_a_spike_is_told_by_its_distance_from_the_recent_mean():
    losses = RecentMean()
    for _ in range(WARM_UP):
        assert losses.ratio(100.0) == 1.0  # nothing to compare with yet
        losses.add(2.0)
    assert losses.ratio(5.0) == pytest.approx(2.5)
