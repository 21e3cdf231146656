"""The figures of an index are what counting by hand gives; the tool profiles a file and a model.

Owns no claim about a trained model's index.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from eval_folder import TOPK

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import profile_index

from megatron_clsa.evaluate.index_structure import structure

ROOT = Path(__file__).resolve().parents[2]


def window_index(length: int, k: int) -> torch.Tensor:
    """Every row selects its last k positions."""
    index = torch.arange(length)[:, None] - torch.arange(k - 1, -1, -1)
    index = torch.where(index < 0, length, index).sort(-1).values
    return torch.where(index == length, -1, index).int()


def random_index(length: int, k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    index = torch.full((length, k), -1, dtype=torch.int32)
    for t in range(length):
        chosen = torch.randperm(t + 1, generator=generator)[:k].sort().values
        index[t, : len(chosen)] = chosen
    return index


def test_a_sliding_window_by_hand():
    report = structure(window_index(200, 16))
    assert report["long_rows"] == 200 - 16
    assert report["overlap_by_lag"] == {
        lag: pytest.approx(max(0, 16 - lag) / 16) for lag in (1, 2, 4, 8, 16, 32, 64)
    }
    assert report["union_over_k"][8] == pytest.approx((16 + 7) / 16)
    assert report["run_lengths"]["mean"] == 16
    assert report["hot_keys"]["hottest"][0]["share_of_rows"] == pytest.approx(16 / 184)


def test_a_random_index_against_sets():
    index = random_index(150, 12)
    report = structure(index)
    rows = [set(row.tolist()) for row in index]
    shared = [len(rows[t] & rows[t - 4]) / 12 for t in range(16, 150)]
    assert report["overlap_by_lag"][4] == pytest.approx(sum(shared) / len(shared))
    unions = [len(set().union(*rows[t : t + 16])) / 12 for t in range(12, 135)]
    assert report["union_over_k"][16] == pytest.approx(sum(unions) / len(unions), rel=0.05)
    touched = {(t // 64, p // 64) for t in range(64, 150) for p in rows[t]}
    assert report["empty_blocks"][64] == pytest.approx(1 - len(touched) / (2 + 3))
    assert report["run_lengths"]["share_in_runs_of_at_least"][1] == 1.0


def run(*arguments):
    command = [sys.executable, str(ROOT / "tools" / "profile_index.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_the_tool_profiles_a_saved_index(tmp_path):
    torch.save(random_index(150, 12), tmp_path / "index.pt")
    result = run("--index", tmp_path / "index.pt", "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    (report,) = json.loads((tmp_path / "out" / "index.json").read_text())
    assert report["index_topk"] == 12 and report["long_rows"] == 138
    assert (tmp_path / "out" / "index.png").stat().st_size > 1000


def test_the_tool_profiles_a_model(folder, text, tmp_path):
    result = run("--model", folder, "--text", text, "--length", 100, "--sequences", 2, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    reports = json.loads((tmp_path / "index.json").read_text())
    assert [report["long_rows"] for report in reports] == [100 - TOPK] * 2


def refused(capsys, *arguments) -> str:
    """What the tool says on one line, run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["profile_index.py", *map(str, arguments)])
        assert profile_index.main() == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    "content",
    [
        torch.zeros(3, 4),
        torch.zeros(3, 4, dtype=torch.bool),
        torch.zeros(3, 4, dtype=torch.complex64),
        window_index(9, 2).to_sparse(),
        torch.zeros(0, 4, dtype=torch.int32),
        torch.zeros(4, dtype=torch.int32),
        "no tensor",
    ],
    ids=["float", "bool", "complex", "sparse", "empty", "one axis", "no tensor"],
)
def test_a_file_that_is_no_index_is_refused(content, tmp_path, capsys):
    torch.save(content, tmp_path / "index.pt")
    assert "--index" in refused(capsys, "--index", tmp_path / "index.pt", "--out", tmp_path)


@pytest.mark.parametrize("content", ["", "hello"])
def test_a_file_that_torch_did_not_save_is_refused(content, tmp_path, capsys):
    (tmp_path / "index.pt").write_text(content)
    said = refused(capsys, "--index", tmp_path / "index.pt", "--out", tmp_path)
    assert "is no file of torch.save" in said
    assert "No such file" in refused(capsys, "--index", tmp_path / "none.pt", "--out", tmp_path)


@pytest.mark.parametrize(
    "row, remedy",
    [
        ([10, 9, 8, 7], "ascend"),
        ([7, 8, 8, 9], "ascend"),
        ([7, -1, 8, 9], "-1 only after them"),
        ([8, 9, 10, 11], "the row's own"),
        ([-7, 8, 9, 10], "-1 or positions"),
    ],
    ids=["reversed", "twice", "-1 before", "future", "-7"],
)
def test_rows_that_the_kernels_do_not_make_are_refused(row, remedy, tmp_path, capsys):
    index = window_index(40, 4)
    index[10] = torch.tensor(row)
    torch.save(torch.stack([window_index(40, 4), index]), tmp_path / "index.pt")
    said = refused(capsys, "--index", tmp_path / "index.pt", "--out", tmp_path)
    assert "sequence 1, row 10" in said and remedy in said


@pytest.mark.parametrize(
    "words, flag",
    [
        ("--length 0", "--length 0"),
        ("--length -5", "--length -5"),
        ("--sequences 0", "--sequences 0"),
        ("--device bogus", "--device bogus"),
        ("--device cuda:99", "--device cuda:99"),
    ],
)
def test_bad_flags_are_refused_before_a_model_is_loaded(words, flag, tmp_path, capsys):
    arguments = "--model", tmp_path / "none", "--text", tmp_path / "none.txt", "--out", tmp_path / "out"
    assert f"error: {flag}" in refused(capsys, *arguments, *words.split())


def test_an_out_that_is_a_file_is_refused_before_work(tmp_path, capsys):
    out = tmp_path / "file"
    out.write_text("kept")
    assert f"--out {out} is a file" in refused(capsys, "--index", tmp_path / "none.pt", "--out", out)


def test_rows_that_select_all_they_see_are_refused(tmp_path):
    torch.save(window_index(10, 16), tmp_path / "index.pt")
    result = run("--index", tmp_path / "index.pt", "--out", tmp_path)
    assert result.returncode == 2 and "no row sees more than k = 16" in result.stderr
