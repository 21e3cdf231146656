"""Applies the no-GPU patches before any test imports megatron-core; skips GPU tests where there is none.

Orders the files, too: the long ones first.
"""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # threads of one worker would wait for cores that another has
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch starts, hence before the imports below

import pytest
import torch

if not torch.cuda.is_available():  # read when a kernel is decorated, hence before the imports below
    os.environ.setdefault("TRITON_INTERPRET", "1")

import megatron_clsa.parallel.cpu  # noqa: F401

# Files that take a minute or more; first, so that workers end together (run.sh keeps xdist to this order).
LONG = (
    "test_indexer_topk_triton.py",
    "test_layouts.py",
    "test_runs.py",
    "test_slurm.py",
    "test_guards.py",
    "test_sparse_attention.py",
    "test_finetune.py",
)


def _missing(item) -> str | None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        return "needs a CUDA device"
    if item.get_closest_marker("te"):
        try:
            import transformer_engine.pytorch  # noqa: F401
        except (ImportError, OSError):
            return "needs Transformer Engine"
    return None


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)
    for item in items:
        if reason := _missing(item):
            item.add_marker(pytest.mark.skip(reason=reason))
