"""The bench tool times both sides and writes the rows that the docs quote. Owns no speed claim."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import bench_kernels
from bench.harness import FAMILIES, Comparison, length_name

ROOT = Path(__file__).resolve().parents[2]
ROW_KEYS = {"metric", "value", "unit", "peer", "peer_value", "ratio", "shape", "machine", "date", "command"}


def run(*arguments):
    command = [sys.executable, str(ROOT / "tools" / "bench_kernels.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
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


def bench(monkeypatch, *arguments) -> int:
    """The tool in this process, on the CPU."""
    options = "--lengths", "64", "--device", "cpu", "--seconds", "0.01"
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", *options, *map(str, arguments)])
    return bench_kernels.main()


def planted(*calls):
    """A family of a case for each call."""
    return lambda settings: (
        Comparison(f"{call.__name__}_{length_name(settings.lengths[0])}_ms", "none", call) for call in calls
    )


def works():
    return None


def works_too():
    return None


def fails():
    raise RuntimeError("planted")


def test_a_family_that_fails_leaves_the_rows_before_it_and_the_next_family(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(FAMILIES, "first", planted(works, fails))
    monkeypatch.setitem(FAMILIES, "second", planted(works_too))
    out = tmp_path / "rows" / "kernels.json"
    assert bench(monkeypatch, "--only", "first", "second", "--out", out) == 1
    printed = capsys.readouterr().out
    assert "family first stopped early" in printed and "family second stopped" not in printed
    rows = {row["metric"]: row for row in json.loads(out.read_text())}
    assert rows.keys() == {"works_64_ms", "works_too_64_ms"}
    command = "python tools/bench_kernels.py --only first second --lengths 64 --seconds 0.01"
    assert rows["works_64_ms"]["command"] == command


@pytest.mark.parametrize(
    "words, message",
    [
        ("--only nonsense", "--only nonsense"),
        ("--lengths 64 0", "--lengths 0"),
        ("--lengths -5", "--lengths -5"),
        ("--seconds nan", "--seconds nan"),
        ("--seconds -1", "--seconds -1"),
        ("--device bogus", "--device bogus"),
        ("--device cuda:99", "--device cuda:99"),
        ("--out .", "--out . cannot be written"),
        ("--out bad.json", "--out bad.json holds something else"),
        ("--out other.json", "--out other.json holds something else"),
        ("--out bad.json/kernels.json", "--out bad.json/kernels.json cannot be written"),
    ],
)
def test_what_cannot_be_timed_or_written_is_refused_before_the_clock(
    words, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("{bad")
    (tmp_path / "other.json").write_text('["not a row"]')
    monkeypatch.setitem(FAMILIES, "planted", planted(works))
    assert bench(monkeypatch, "--only", "planted", "--out", "new.json", *words.split()) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {message}") and printed.err.count("\n") == 1
    assert "works" not in printed.out and (tmp_path / "bad.json").read_text() == "{bad"
