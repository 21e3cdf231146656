"""docs/kernels.md quotes docs/results/kernels.json: every table row of a metric equals the measured row.

Owns no figure. A table row reads `| metric | value | peer | peer value | ratio | ceiling |`, rounded.
"""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def quoted_rows():
    page = (ROOT / "docs" / "kernels.md").read_text()
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if re.match(r"\| `\w+_(ms|us)` \|", line)
    ]


def measured_rows():
    rows = json.loads((ROOT / "docs" / "results" / "kernels.json").read_text())
    return {(row["metric"], row["peer"]): row for row in rows}


@pytest.mark.parametrize("cells", quoted_rows(), ids=lambda cells: cells[0])
def test_quoted_figures_are_the_measured_ones(cells):
    metric, value, peer, peer_value, ratio, ceiling = cells
    row = measured_rows()[metric.strip("`"), None if peer == "none" else peer]
    assert float(value) == pytest.approx(row["value"], rel=0.01)
    assert float(ceiling) == pytest.approx(row["ceiling"], rel=0.02)
    if row["peer"]:
        assert float(peer_value) == pytest.approx(row["peer_value"], rel=0.01)
        assert float(ratio) == pytest.approx(row["ratio"], rel=0.02)
