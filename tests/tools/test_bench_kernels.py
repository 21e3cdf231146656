"""The bench tool times both sides and writes the rows that the docs quote. Owns no speed claim."""

import json
import os
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
ROW_KEYS = {"metric", "value", "unit", "peer", "peer_value", "ratio", "shape", "machine", "date", "command"}


def run(*arguments):
    command = [sys.executable, os.path.join(ROOT, "tools", "bench_kernels.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": ROOT}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_rows_have_the_documented_keys_and_other_rows_stay(tmp_path):
    out = tmp_path / "kernels.json"
    other = dict.fromkeys(ROW_KEYS, "kept")
    out.write_text(json.dumps([other]))
    result = run(
        "--only", "topk", "--lengths", "64", "--seconds", "0.01", "--device", "cpu", "--out", str(out)
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads(out.read_text())
    assert other in rows
    measured = [row for row in rows if row["metric"] == "indexer_topk_64_ms"]
    assert measured and all(row.keys() >= ROW_KEYS for row in measured)
    assert all(row["ratio"] == pytest.approx(row["value"] / row["peer_value"], rel=0.05) for row in measured)


def test_unknown_family_is_refused_in_one_line():
    result = run("--only", "nonsense")
    assert result.returncode == 2
    assert result.stderr.startswith("error: --only nonsense") and result.stderr.count("\n") == 1


def test_a_family_that_fails_leaves_the_rows_before_it_and_the_next_family(tmp_path):
    out = tmp_path / "kernels.json"
    options = "--seconds", "0.01", "--device", "cpu", "--out", str(out)
    result = run("--only", "topk", "kd", "--lengths", "64", "-1", *options)
    assert result.returncode == 1
    assert "family topk stopped early" in result.stdout and "family kd stopped early" in result.stdout
    metrics = {row["metric"] for row in json.loads(out.read_text())}
    assert metrics == {
        "indexer_topk_64_ms", "kd_full_64_ms", "kd_selected_64_ms", "kd_selected_local_64_ms"
    }  # fmt: skip
