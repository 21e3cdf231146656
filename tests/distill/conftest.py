"""Lets these tests use the rank helpers of `tests/parallel` and the plain model of `tests/model`."""

import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS / "parallel"), str(TESTS / "model"), str(TESTS / "distill")]
