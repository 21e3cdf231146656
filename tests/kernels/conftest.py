"""Poisons fresh memory, so that a kernel that leaves an element unwritten is caught."""

import fcntl
import os
import tempfile
from pathlib import Path

import pytest
import torch
import triton_interpreter  # noqa: F401  (repairs it)

# Deterministic algorithms are on in every test here, and cuBLAS then asks for this.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def poisoned_empty():
    """`torch.empty` returns NaN in floating tensors while a kernel test runs."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the references' products need it
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def one_large_test_at_a_time(request):
    """Workers share a GPU: tests marked `large` take turns, and give back what the allocator kept."""
    if request.node.get_closest_marker("large") is None:
        yield
        return
    with open(Path(tempfile.gettempdir()) / "megatron_clsa_large_tests.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
