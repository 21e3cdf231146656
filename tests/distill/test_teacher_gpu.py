"""The teacher on a GPU gives the CPU's targets: whole sequences, documents kept apart."""

from pathlib import Path

import pytest
import torch
from taught import save_teacher

from megatron_clsa.distill.teacher import Teacher, TeacherSpec

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def _targets(folder: Path, dtype: str, device: str):
    tokens = torch.randint(0, 61, (40,), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(15), torch.arange(25)])
    spec = TeacherSpec(folder, dtype, 1, 61, 61, 2.0, (1, 3))
    ids, log_probs, states = Teacher(spec, device).targets(tokens.to(device), positions.to(device))
    whole = torch.zeros_like(log_probs).scatter(1, ids.long(), log_probs)  # by token: ties may swap places
    return whole.cpu(), states.float().cpu()


# bf16 keeps 8 bits, and three layers add up: a log probability of about -4 is off by a few hundredths.
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-4), ("bf16", 0.1)])
def test_targets_equal_the_cpus(folder, dtype, tolerance):
    for actual, expected in zip(
        _targets(folder, dtype, "cuda"), _targets(folder, "fp32", "cpu"), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
