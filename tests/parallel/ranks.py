"""Lends the tests the spawner of tools/multirank: a function on N gloo ranks of this machine."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from multirank.ranks import run_ranks  # noqa: F401
