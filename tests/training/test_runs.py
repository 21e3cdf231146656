"""Whole runs through every phase: the same losses at any layout, and the same run when cut and resumed."""

import pytest
from runs import distill, metrics

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
NOT_COMPARED = {"tokens_per_second", "step_time", "peak_memory_bytes"}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    result = distill(out)
    assert result.returncode == 0, result.stderr[-3000:]
    return metrics(out)


def _steps(lines: list[dict]) -> list[dict]:
    return [line for line in lines if "lm_loss" in line]


def test_every_step_and_evaluation_logs_its_fields(whole_run):
    steps = _steps(whole_run)
    assert [line["step"] for line in steps] == list(range(1, 21))
    assert all(line.keys() >= STEP_FIELDS for line in steps)
    evaluations = [line for line in whole_run if "valid_lm_loss" in line]
    assert {line["phase"] for line in evaluations} == {"dense", "warmup", "sparse"}
    assert all(line.keys() >= EVALUATION_FIELDS for line in evaluations)


def test_a_phase_is_first_evaluated_where_the_one_before_ended(whole_run):
    """On the same sequences, so that any difference would be the weights'."""
    ends = {line["phase"]: line for line in whole_run if "valid_lm_loss" in line}
    starts = {line["phase"]: line for line in whole_run if "valid_lm_loss" in line and not line["phase_step"]}
    assert starts["warmup"]["valid_lm_loss"] == ends["dense"]["valid_lm_loss"]
    assert starts["sparse"]["valid_lm_loss_dense"] == ends["warmup"]["valid_lm_loss_dense"]


@pytest.mark.parametrize(
    "ranks, flags",
    [(2, ["--tensor-model-parallel-size", "2"]), (2, ["--context-parallel-size", "2"])],
    ids=["tp2", "cp2"],
)
def test_twenty_steps_log_the_same_losses_at_any_layout(whole_run, tmp_path, ranks, flags):
    result = distill(tmp_path, *flags, ranks=ranks)
    assert result.returncode == 0, result.stderr[-3000:]
    for expected, actual in zip(_steps(whole_run), _steps(metrics(tmp_path)), strict=True):
        assert actual["lm_loss"] == pytest.approx(expected["lm_loss"], abs=1e-4)
        assert actual["kd_loss"] == pytest.approx(expected["kd_loss"], abs=1e-4)


def test_a_run_cut_inside_a_phase_resumes_bitwise(whole_run, tmp_path):
    """The same command again goes on from the newest checkpoint; every figure is equal to the last bit."""
    cut = distill(tmp_path, "--exit-interval", "6", "--save-interval", "6", "--phases", "dense")
    assert cut.returncode == 75, cut.stderr[-3000:]
    assert [line["step"] for line in _steps(metrics(tmp_path))] == list(range(1, 7))
    rest = distill(tmp_path)
    assert rest.returncode == 0, rest.stderr[-3000:]
    for expected, actual in zip(whole_run, metrics(tmp_path), strict=True):
        same = expected.keys() - NOT_COMPARED
        assert {key: actual[key] for key in same} == {key: expected[key] for key in same}
