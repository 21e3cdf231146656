"""tools/check_parallel.py: what it runs, what it refuses, and that a difference makes it fail."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import check_parallel
import planted
from multirank import check
from multirank.ranks import Ranks


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


@pytest.mark.parametrize(
    "error, layout, case", [("lost_halo", "cp2", "dense"), ("other_index", "cp2", "sparse")]
)
def test_a_planted_error_is_a_failure(error, layout, case, monkeypatch, capsys):
    monkeypatch.setattr(check, "steps", getattr(planted, error))
    words = ["--ranks", "2", "--layouts", layout, "--cases", case, "--no-resume"]
    assert check_parallel.main(words) == 1
    assert f"FAIL {layout}" in capsys.readouterr().out


@pytest.mark.slow
def test_unsummed_gradients_of_replicated_weights_are_a_failure(monkeypatch, capsys):
    monkeypatch.setattr(check, "steps", planted.unsummed_norms)
    words = ["--ranks", "2", "--layouts", "tp2", "--cases", "dense", "--no-resume"]
    assert check_parallel.main(words) == 1
    assert "FAIL tp2" in capsys.readouterr().out


def test_a_rank_that_dies_is_a_failure_of_its_layout_only():
    ranks = Ranks(2)
    with pytest.raises(AssertionError, match=r"rank \d failed"):
        ranks.everywhere(no_such_layout)
    assert ranks.alone(len, "one") == 3
    ranks.close()


def test_a_rank_that_hangs_is_named_and_ended():
    ranks = Ranks(2)
    assert ranks.everywhere(len, "one") == [3, 3]
    ranks.limit = 10.0  # rank 0 answers in that on a busy machine
    with pytest.raises(AssertionError, match=r"ranks \[1\] of 2 did not answer in 10 s"):
        ranks.everywhere(rank_1_waits)
    ranks.limit = 240.0
    assert ranks.everywhere(len, "one") == [3, 3]
    ranks.close()


def rank_1_waits():
    time.sleep(600 if dist.get_rank() == 1 else 0)


def no_such_layout():
    raise RuntimeError("planted")


@pytest.mark.parametrize("world, count", [(1, 1), (2, 5), (4, 14), (8, 29)])
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
