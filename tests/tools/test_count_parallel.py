"""tools/count_parallel.py: a full-size step's traffic equals the estimate; an estimate that is off fails."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import count_parallel

from megatron_clsa.estimate import links


@pytest.mark.parametrize(
    "sizes, links_used", [("--tp 2 --cp 2", {"TP", "CP", "DP"}), ("--cp 8", {"CP", "DP"})]
)
def test_the_estimate_is_what_a_full_size_step_sends(sizes, links_used, tmp_path, capsys):
    out = tmp_path / "rows.json"
    words = f"{sizes} --phase sparse --seq 131072 --microbatches 1 --json"
    assert count_parallel.main([*words.split(), str(out)]) == 0, capsys.readouterr().out
    rows = {row["link"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows.keys() == links_used
    assert rows["CP"]["operations"]["all-gather"][0] == 1  # the memory, once a microbatch


def test_an_estimate_that_is_off_is_a_failure(monkeypatch, capsys):
    monkeypatch.setattr(links, "data", lambda run, stage: 0.0)
    words = "--phase dense --pp 2 --dp 2 --seq 8192 --microbatches 2"
    assert count_parallel.main(words.split()) == 1
    verdicts = [line.split()[:4:3] for line in capsys.readouterr().out.splitlines()[1:]]
    assert verdicts == [["ok", "PP"], ["FAIL", "DP"]] * 2


@pytest.mark.parametrize("words", ["--seq 100 --cp 8", "--tp 0", "--pp 3", "--microbatches 1 --pp 2"])
def test_bad_input_is_refused_in_one_line(words, capsys):
    assert count_parallel.main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --") and error.count("\n") == 1
