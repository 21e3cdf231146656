"""tools/check_parallel.py: what it runs, what it refuses, and that a difference makes it fail."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import check_parallel
from multirank import check


def test_layouts_hold_to_one_process_and_resume_each_other(tmp_path, capsys):
    out = tmp_path / "rows.json"
    words = ["--ranks", "2", "--layouts", "pp2_vpp2", "--cases", "sparse", "--json", str(out)]
    assert check_parallel.main(words) == 0, capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert [(row["layout"], row["case"]) for row in rows] == [
        ("pp2_vpp2", "sparse"),
        ("pp2_vpp2", "resume single"),
        ("single", "resume pp2_vpp2"),
    ]
    assert rows[0]["index"] == "identical"


def test_a_difference_is_a_failure(monkeypatch, capsys):
    monkeypatch.setattr(check, "FLOOR", dict.fromkeys(check.FLOOR, 0.0))
    assert check_parallel.main(["--ranks", "2", "--layouts", "cp2", "--cases", "dense", "--no-resume"]) == 1
    assert capsys.readouterr().out.startswith("FAIL cp2")


@pytest.mark.parametrize("world, count", [(2, 5), (4, 14), (8, 29)])
def test_every_combination_that_fills_the_world_is_there(world, count):
    layouts = check.layouts_of(world)
    assert len(layouts) == count and all(layout.world == world for layout in layouts.values())


def test_two_indices_for_one_microbatch_are_found():
    case = check.cases_of(2, check.torch.float32)[1]
    same, other = list("abcd"), list("abce")
    readers = [{"index_calls": 4, "index_used": digests} for digests in (same, other)]
    assert check.index_verdict(check.Layout(cp=2), case, readers, None) == "5 indices for 4 microbatches"


@pytest.mark.parametrize(
    "words, message",
    [
        ("--ranks 3", "--ranks 3"),
        ("", "--ranks is missing"),
        ("--ranks 2 --layouts tp4", "--layouts tp4"),
        ("--ranks 2 --cases all", "--cases all"),
        ("--ranks 2 --json no/such/folder.json", "--json no/such/folder.json"),
    ],
)
def test_bad_input_is_refused_in_one_line(words, message, capsys):
    assert check_parallel.main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
