"""Whole runs through every phase: the same losses at any layout, and the same run when cut and resumed."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from runs import ENVIRONMENT, TINY, command, distill, metrics, run, steps

STEP_FIELDS = {
    "step",
    "phase",
    "consumed_tokens",
    "lm_loss",
    "kd_loss",
    "grad_norm",
    "learning_rate",
    "tokens_per_second",
    "step_time",
}
EVALUATION_FIELDS = {"valid_lm_loss", "attention_coverage", "oracle_coverage", "exact_kl"}
NOT_COMPARED = {"tokens_per_second", "step_time", "mfu", "peak_memory_bytes"}
LAYOUTS = {
    "single": (1, []),
    "tp2": (2, ["--tensor-model-parallel-size=2"]),
    "cp2": (2, ["--context-parallel-size=2"]),
    "dp4": (4, []),
    "dp2_overlap": (2, ["--overlap-grad-reduce", "--overlap-param-gather"]),  # with frozen weights in warm-up
    "pp2_vpp2": (2, ["--pipeline-model-parallel-size=2", "--num-virtual-stages-per-pipeline-rank=2"]),
    "tp2_pp2": (4, ["--tensor-model-parallel-size=2", "--pipeline-model-parallel-size=2"]),
}


def _run(layout: str, out: Path, *flags: str) -> list[dict]:
    """The metrics of a run to its end."""
    ranks, sizes = LAYOUTS[layout]
    result = distill(out, *sizes, *flags, ranks=ranks)
    assert result.returncode == 0, result.stderr[-3000:]
    return metrics(out)


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """Metrics of an uninterrupted run at a layout, run once."""
    made = {}

    def of(layout: str) -> list[dict]:
        if layout not in made:
            made[layout] = _run(layout, tmp_path_factory.mktemp(layout))
        return made[layout]

    return of


def _losses(lines: list[dict]) -> list[dict]:
    return [line for line in lines if "lm_loss" in line]


def _assert_bitwise(expected: list[dict], actual: list[dict]) -> None:
    for wanted, line in zip(expected, actual, strict=True):
        same = wanted.keys() - NOT_COMPARED
        assert {key: line[key] for key in same} == {key: wanted[key] for key in same}


def test_every_step_and_evaluation_logs_its_fields(whole_run):
    lines = _losses(whole_run("single"))
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert all(line.keys() >= STEP_FIELDS for line in lines)
    evaluations = [line for line in whole_run("single") if "valid_lm_loss" in line]
    assert {line["phase"] for line in evaluations} == {"dense", "warmup", "sparse"}
    assert all(line.keys() >= EVALUATION_FIELDS for line in evaluations)


def test_a_phase_starts_with_no_model_or_optimizer_of_the_phases_before(tmp_path):
    words = command(tmp_path, "--train-iters", "2")
    words[1] = str(Path(__file__).parent / "alive_run.py")
    result = run(words)
    assert result.returncode == 0, result.stderr[-3000:]
    assert [line for line in result.stdout.splitlines() if line.startswith("alive")] == ["alive 0"] * 3


@pytest.mark.parametrize("layout", ["tp2", "cp2", "pp2_vpp2", "dp2_overlap"])
def test_twenty_steps_log_the_same_losses_at_any_layout(whole_run, layout):
    expected, actual = (_losses(whole_run(name)) for name in ("single", layout))
    assert len(actual) == 20
    for wanted, line in zip(expected, actual, strict=True):
        assert line["lm_loss"] == pytest.approx(wanted["lm_loss"], abs=1e-4)
        assert line["kd_loss"] == pytest.approx(wanted["kd_loss"], abs=1e-4)


def _cut_in(phase: str, step: int, folder: Path) -> Path:
    """The recipe, left with a checkpoint at a step of one phase."""
    recipe = folder / f"cut_in_{phase}.yaml"
    cut = f"name: {phase}, exit_interval: {step}, save_interval: {step}"
    recipe.write_text(TINY.read_text().replace(f"name: {phase}", cut))
    return recipe


def test_a_run_cut_inside_every_phase_resumes_bitwise(whole_run, tmp_path):
    """The same command again goes on from the newest checkpoint; steps that were lost are logged once."""
    out, done = tmp_path / "run", 0
    for phase, step, logged in (("dense", 6, 6), ("warmup", 2, 12), ("sparse", 3, 17)):
        cut = distill(out, recipe=_cut_in(phase, step, tmp_path))
        assert cut.returncode == 75, cut.stderr[-3000:]
        assert [line["step"] for line in steps(out)[done:]] == list(range(done + 1, logged + 1))
        _leave_steps_without_a_checkpoint(out)
        done = logged
    _assert_bitwise(whole_run("single"), _run("single", out))


def _leave_steps_without_a_checkpoint(out: Path) -> None:
    """As a kill two steps after the checkpoint does."""
    last = steps(out)[-1]
    with (out / "metrics.jsonl").open("a") as file:
        for more in (1, 2):
            lost = {"step": last["step"] + more, "phase_step": last["phase_step"] + more}
            file.write(json.dumps(last | lost) + "\n")
        file.write('{"step": 9, "lm_lo')


def _cut(layout: str, out: Path, after: int, number: signal.Signals, *flags: str) -> int:
    """Start a run, signal it once `after` steps are logged. Returns its exit code."""
    ranks, sizes = LAYOUTS[layout]
    words = command(out, *sizes, *flags, ranks=ranks)
    process = subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while not (out / "metrics.jsonl").exists() or len(steps(out)) < after:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        return process.wait(timeout=180)
    finally:
        process.kill()


@pytest.mark.parametrize(
    "layout, number", [("tp2", signal.SIGTERM), ("pp2_vpp2", signal.SIGUSR1)], ids=["tp2", "pp2_vpp2"]
)
def test_a_signal_saves_on_every_rank_and_the_run_goes_on_bitwise(whole_run, tmp_path, layout, number):
    assert _cut(layout, tmp_path, 3, number, "--phases=dense") == 75
    done = len(steps(tmp_path))
    tracker = tmp_path / "checkpoints" / "01_dense" / "latest_checkpointed_iteration.txt"
    assert 3 <= done < 10 and int(tracker.read_text()) == done
    rest = _run(layout, tmp_path, "--phases=dense")
    _assert_bitwise([line for line in whole_run(layout) if line["phase"] == "dense"], rest)


@pytest.fixture(scope="session")
def cut_at_tp2_pp2(tmp_path_factory) -> Path:
    """A run of TP2 x PP2 that was left after five steps."""
    out = tmp_path_factory.mktemp("cut")
    ranks, sizes = LAYOUTS["tp2_pp2"]
    left = distill(out, *sizes, "--phases=dense", "--exit-interval=5", "--save-interval=5", ranks=ranks)
    assert left.returncode == 75, left.stderr[-3000:]
    return out


@pytest.mark.parametrize("layout", ["single", "cp2", "dp4"])
def test_a_checkpoint_of_tp2_pp2_goes_on_at_another_layout(whole_run, cut_at_tp2_pp2, tmp_path, layout):
    out = shutil.copytree(cut_at_tp2_pp2, tmp_path / "run")
    actual = _losses(_run(layout, out, "--phases=dense"))
    expected = [line for line in _losses(whole_run("single")) if line["phase"] == "dense"]
    for wanted, line in zip(expected, actual, strict=True):
        assert line["lm_loss"] == pytest.approx(wanted["lm_loss"], abs=1e-5)
