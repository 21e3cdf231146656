"""Lends the tests the step that tools/multirank owns, so that tests and tools run the same thing."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from multirank.layouts import (  # noqa: F401
    MICRO,
    NUM_MICRO,
    SEQ,
    VOCAB,
    Case,
    Layout,
    Workload,
    batches,
    build,
    compare_gradients,
    load_weights,
    make_config,
    run_batch,
    save_gradients,
    save_weights,
    sharded,
    step,
    steps,
)
from multirank.resume import updated  # noqa: F401
