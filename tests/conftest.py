"""Applies the no-GPU patches before any test imports megatron-core; skips GPU tests where there is none."""

import os

import pytest
import torch

if not torch.cuda.is_available():  # read when a kernel is decorated, hence before the imports below
    os.environ.setdefault("TRITON_INTERPRET", "1")

import megatron_clsa.parallel.cpu  # noqa: F401


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
    for item in items:
        if reason := _missing(item):
            item.add_marker(pytest.mark.skip(reason=reason))
