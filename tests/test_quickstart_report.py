"""The report's verdicts on made-up metrics: each claim fails alone, and a missing figure never passes."""

import json

import pytest

from megatron_clsa.errors import UserError
from megatron_clsa.training.report import judge, main, read_evaluations

COVERAGE = dict(attention_coverage=0.8, oracle_coverage=0.85, random_coverage=0.2, recent_coverage=0.5)
BOTH = dict(valid_lm_loss_dense=4.0, valid_lm_loss_sparse=4.01)


def evaluations() -> dict[str, list[dict]]:
    return {
        "dense_short": [dict(valid_lm_loss=6.0), dict(valid_lm_loss=5.0)],
        "dense_long": [dict(valid_lm_loss=4.8), dict(valid_lm_loss=4.5)],
        "warmup": [dict(valid_lm_loss=4.5) | BOTH | COVERAGE],
        "sparse": [dict(valid_lm_loss=4.01) | BOTH | COVERAGE],
    }


def test_a_good_run_shows_every_claim():
    assert all(judge(evaluations(), logits_gap=5e-5).values())


@pytest.mark.parametrize(
    "phase, change, claim",
    [
        ("dense_short", dict(valid_lm_loss=6.1), "loss_falls_in_dense_short"),
        ("dense_long", dict(valid_lm_loss=None), "loss_falls_in_dense_long"),
        ("warmup", dict(oracle_coverage=0.9), "coverage_near_oracle"),
        ("warmup", dict(random_coverage=0.7), "coverage_above_random"),
        ("warmup", dict(recent_coverage=None), "coverage_above_recent"),
        ("sparse", dict(valid_lm_loss_sparse=4.03), "sparse_loss_near_dense"),
        ("sparse", dict(valid_lm_loss_dense=None), "sparse_loss_near_dense"),
    ],
)
def test_each_claim_fails_alone(phase, change, claim):
    phases = evaluations()
    phases[phase][-1].update(change)
    assert [name for name, passed in judge(phases).items() if not passed] == [claim]


def test_a_kl_to_the_teacher_must_fall_and_is_reported(tmp_path):
    lines = [dict(phase="heal", valid_lm_loss=6 - n, valid_teacher_kl=kl) for n, kl in enumerate((1.0, 2.0))]
    assert judge({"heal": lines})["teacher_kl_falls_in_heal"] is False
    assert judge({"heal": [lines[0], lines[1] | dict(valid_teacher_kl=0.5)]})["teacher_kl_falls_in_heal"]
    metrics, report = tmp_path / "metrics.jsonl", tmp_path / "report.json"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    main(["--metrics", str(metrics), "--report", str(report)])
    healed = json.loads(report.read_text())["phases"]["heal"]
    assert (healed["first_valid_teacher_kl"], healed["valid_teacher_kl"]) == (1.0, 2.0)


def test_logits_off_by_more_than_rounding_fail():
    assert not judge(evaluations(), logits_gap=2e-4)["logits_equal"]


def test_a_failed_claim_is_named_in_one_line_and_in_the_report(tmp_path, capsys):
    lines = [dict(phase="dense", valid_lm_loss=6.0), dict(phase="dense", valid_lm_loss=7.0)]
    metrics, report = tmp_path / "metrics.jsonl", tmp_path / "report.json"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in [dict(phase="dense", lm_loss=6), *lines]))
    assert read_evaluations(metrics) == {"dense": lines}
    assert main(["--metrics", str(metrics), "--report", str(report)]) == 1
    assert "loss_falls_in_dense" in capsys.readouterr().err
    assert json.loads(report.read_text())["passed"] is False


@pytest.mark.parametrize("metrics, report", [("", "report.json"), ("metrics.jsonl", "file/report.json")])
def test_files_that_cannot_be_read_or_written_are_named(tmp_path, metrics, report):
    (tmp_path / "file").touch()
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"phase": "dense", "valid_lm_loss": 1.0}) + "\n")
    named = tmp_path / (report if metrics else "")
    with pytest.raises(UserError, match=f"--(metrics|report) {named}"):
        main(["--metrics", str(tmp_path / metrics), "--report", str(tmp_path / report)])
