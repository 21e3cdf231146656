"""The teacher on a GPU gives the CPU's targets: whole sequences, documents kept apart."""

from pathlib import Path

import pytest
import torch
from taught import save_teacher
from torch import Tensor

from megatron_clsa.distill.teacher import Teacher, TeacherSpec

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def _targets(folder: Path, dtype: str, device: str) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 61, (40,), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(15), torch.arange(25)])
    spec = TeacherSpec(folder, dtype, 1, 61, 61, 2.0, (1, 3))
    ids, log_probs, states = Teacher(spec, device).targets(tokens.to(device), positions.to(device))
    whole = torch.zeros_like(log_probs).scatter(1, ids.long(), log_probs)  # by token: ties may swap places
    return whole.float().cpu(), states.float().cpu()


def test_fp32_targets_equal_the_cpus(folder):
    for actual, expected in zip(
        _targets(folder, "fp32", "cuda"), _targets(folder, "fp32", "cpu"), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_bf16_targets_err_no_more_than_the_cpus_in_bf16(folder):
    """At most twice the CPU's own bf16 error against fp32, in norm: single elements of a model drawn at
    random are far off on either device."""
    exact, theirs, ours = (
        _targets(folder, *where) for where in (("fp32", "cpu"), ("bf16", "cpu"), ("bf16", "cuda"))
    )
    for expected, cpu, gpu in zip(exact, theirs, ours, strict=True):
        assert (gpu - expected).norm() <= 2 * (cpu - expected).norm()
