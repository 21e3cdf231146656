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


@pytest.mark.parametrize("content", [torch.zeros(3, 4), torch.full((3, 4), 9), "no tensor"])
def test_a_file_that_is_no_index_is_refused_in_one_line(content, tmp_path):
    torch.save(content, tmp_path / "index.pt")
    result = run("--index", tmp_path / "index.pt", "--out", tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: --index") and result.stderr.count("\n") == 1


def test_rows_that_select_all_they_see_are_refused(tmp_path):
    torch.save(window_index(10, 16), tmp_path / "index.pt")
    result = run("--index", tmp_path / "index.pt", "--out", tmp_path)
    assert result.returncode == 2 and "no row sees more than k = 16" in result.stderr
