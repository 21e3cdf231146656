"""A machine that has Transformer Engine but no GPU (a login node) runs as one without it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_an_installed_transformer_engine_is_not_used_without_a_gpu(tmp_path):
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    script = """
import megatron_clsa.parallel.cpu
from megatron.core.optimizer import distrib_optimizer
from megatron_clsa.parallel.fused_adam import FusedAdam
from megatron_clsa.training.arguments import have_transformer_engine
assert distrib_optimizer.Adam is FusedAdam and not have_transformer_engine()
"""
    paths = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
