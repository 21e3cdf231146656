"""docs/parallel.md quotes docs/results/parallel.json: every table row of a metric equals the measured row.

Owns no figure. A table row reads `| metric | value | peer value | ratio | ceiling |`, rounded; `-` for none.
"""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "parallel.json"


def quoted_rows():
    page = (ROOT / "docs" / "parallel.md").read_text()
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if re.match(r"\| `\w+_(ms|us)` \|", line)
    ]


def test_quoted_figures_are_the_measured_ones():
    measured = {row["metric"]: row for row in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    for metric, *figures in quoted_rows():
        row = measured[metric.strip("`")]
        for figure, key in zip(figures, ("value", "peer_value", "ratio", "ceiling"), strict=True):
            if figure == "-":
                assert row[key] is None, metric
            else:
                assert float(figure.replace(",", "")) == pytest.approx(row[key], rel=0.02), (metric, key)
