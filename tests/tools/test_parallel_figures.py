"""docs/parallel.md quotes docs/results/parallel.json: every table row of a metric equals the measured row.

Owns no figure. A table row reads `| metric | value | peer value | ratio | ceiling |`, rounded; `-` for none.
The estimates in a measured row are what the estimator says today.
"""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import bench_parallel
from multirank import predicted

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "parallel.json"


def measured_rows():
    return json.loads(RESULTS.read_text())


def quoted_rows():
    page = (ROOT / "docs" / "parallel.md").read_text()
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if re.match(r"\| `\w+_(ms|us)` \|", line)
    ]


def test_quoted_figures_are_the_measured_ones():
    measured = {row["metric"]: row for row in measured_rows()}
    for metric, *figures in quoted_rows():
        row = measured[metric.strip("`")]
        for figure, key in zip(figures, ("value", "peer_value", "ratio", "ceiling"), strict=True):
            if figure == "-":
                assert row[key] is None, metric
            else:
                assert float(figure.replace(",", "")) == pytest.approx(row[key], rel=0.02), (metric, key)


@pytest.mark.parametrize(
    "row", [row for row in measured_rows() if "predicted_ms" in row], ids=lambda r: r["metric"]
)
def test_estimates_in_the_file_are_the_estimators_and_its_bytes_were_counted(row):
    slice_4b = SimpleNamespace(tiny=False, vocab=16384, layers=4)
    name, impl = row["metric"].rsplit("_", 2)[0], row["shape"].rsplit(", ", 1)[1]
    _, layout, seq, micro = bench_parallel._cases(slice_4b, row["gpus"])[name]
    case = bench_parallel._case(slice_4b, impl, seq, micro)
    for key, value in predicted.of_step(layout, case, impl, row["value"]).items():
        assert value == row[key], key
    assert row["counted_mib"] == pytest.approx(row["estimated_mib"], rel=0.01)
