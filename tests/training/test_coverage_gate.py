"""Sparse adaptation is not entered with an index that covers too little, unless a flag says so, loudly."""

import json
from pathlib import Path

import pytest
from test_recipe_and_flags import RECIPE

from megatron_clsa.launch import launch
from megatron_clsa.training.arguments import parse_command
from megatron_clsa.training.plan import check_gate, make_plan
from megatron_clsa.training.recipe import load_recipe
from megatron_clsa.training.run import main


def _words(folder: Path, covered: float | None, best: float | None = 0.9) -> list[str]:
    """A command whose first phase is complete, with the given coverage at its end."""
    recipe, out = folder / "recipe.yaml", folder / "out"
    recipe.write_text(RECIPE)
    out.mkdir()
    record = {"folder": "01_short", "trainable": "backbone", "steps": 4, "tokens": 128}
    record |= {"attention_coverage": covered, "oracle_coverage": best}
    (out / "run.json").write_text(json.dumps({"complete": {"short": record}}))
    return ["--config", str(recipe), "--out", str(out)]


@pytest.mark.parametrize(
    "covered, best, found", [(0.4, 0.9, "is 0.444 of the oracle's"), (None, 0.9, "was never measured")]
)
def test_too_little_coverage_ends_in_one_line_and_code_2(tmp_path, capsys, covered, best, found):
    assert launch(main, "", _words(tmp_path, covered, best)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and found in error
    assert all(word in error for word in ("phase sparse", "minimum_coverage 0.5", "--ignore-coverage-gate"))


def _enter(words: list[str]) -> None:
    command = parse_command(words)
    plan = make_plan(load_recipe(command.config), command, words)
    check_gate(plan.runs[0], plan.state, plan.ignore_gate)


def test_the_flag_enters_all_the_same_and_says_so(tmp_path, capsys):
    _enter([*_words(tmp_path, 0.4), "--ignore-coverage-gate"])
    warning = capsys.readouterr().err
    assert warning.startswith("WARNING: phase sparse") and "0.444 of the oracle's" in warning


def test_enough_coverage_passes_in_silence(tmp_path, capsys):
    _enter(_words(tmp_path, 0.45))
    assert capsys.readouterr().err == ""
