"""Lets these tests use the rank helpers of `tests/parallel`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "parallel"))
