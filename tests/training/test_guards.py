"""A step that goes wrong on one rank: every rank stops, skips or rolls back alike."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import ENVIRONMENT, TINY, steps

from megatron_clsa.training import guards
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


@pytest.fixture
def guard_of(monkeypatch):
    """Guards that see the losses they are given, and what they said."""
    said = []
    monkeypatch.setattr(guards, "_reduced", lambda loss, model: (loss, None))
    monkeypatch.setattr(guards, "_warn", lambda text, kind="WARNING": said.append(text))
    monkeypatch.setattr(guards, "maybe_finalize_async_save", lambda blocking: None)

    def make(policy: str, losses: list[float], last_step: int = 100):
        step = SimpleNamespace(take_loss=iter(losses).__next__)
        guard = guards.Guard(guards.GuardSettings(on_spike=policy), step, last_step, [])
        return guard, said

    return make


@pytest.mark.parametrize("policy, done", [("warn", "go"), ("skip", "skip")])
def test_a_spike_is_warned_of_or_left_out(guard_of, policy, done):
    guard, said = guard_of(policy, [2.0] * WARM_UP + [5.0, 2.0])
    assert [guard._examine(None, step) for step in range(WARM_UP)] == ["go"] * WARM_UP and not said
    assert guard._examine(None, 21) == done
    assert len(said) == 1 and said[0].startswith("step 21: loss 5 is 2.50 x its recent mean")
    assert guard._examine(None, 22) == "go" and len(said) == 1


@pytest.mark.parametrize("policy, left", [("rollback", guards.RollBack), ("stop", SystemExit)])
def test_a_spike_rolls_back_or_stops_where_that_is_asked(guard_of, policy, left):
    guard, said = guard_of(policy, [2.0] * WARM_UP + [5.0])
    for step in range(WARM_UP):
        guard._examine(None, step)
    with pytest.raises(left):
        guard._examine(None, 21)
    assert len(said) == 1 and guard.bad_steps == [21]


def test_a_gradient_norm_far_above_the_recent_ones_is_warned_of(guard_of):
    guard, said = guard_of("warn", [])
    for step in range(WARM_UP):
        guard.watch_gradient(1.0, step)
    guard.watch_gradient(9.0, 21)
    guard.watch_gradient(float("inf"), 22)  # a loss of which the update is skipped anyway
    assert not said
    guard.watch_gradient(30.0, 23)
    assert len(said) == 1 and said[0].startswith("step 23: gradient norm 30 is")


def test_a_spike_is_told_by_its_distance_from_the_recent_mean():
    losses = RecentMean()
    for _ in range(WARM_UP):
        assert losses.ratio(100.0) == 1.0  # nothing to compare with yet
        losses.add(2.0)
    assert losses.ratio(5.0) == pytest.approx(2.5)
