"""Lends this folder the ranks and the small model of tests/parallel."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))
