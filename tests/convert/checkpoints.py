"""Small checkpoints of any layout, with the `clsa.json` that a run writes."""

import os
import subprocess
from pathlib import Path

import torch
from layouts import SEQ, VOCAB, Case, Layout, build, make_config, sharded
from megatron.core import dist_checkpointing
from ranks import run_ranks

from megatron_clsa.convert.architecture import Architecture

ROOT = Path(__file__).resolve().parents[2]
CASE = Case("sparse")
SEARCHED = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": SEARCHED}


def architecture(layout: Layout, case: Case = CASE) -> Architecture:
    return Architecture.of(
        make_config(layout, case), vocab_size=VOCAB - 3, tie_embeddings=False, max_position_embeddings=SEQ
    )


def _save(layout: Layout, weights: str | None, folder: str) -> None:
    """Weights of `weights`, or new ones in which no norm is all ones, saved from this layout's ranks."""
    models = build(layout, CASE)
    if weights:
        state = dist_checkpointing.load(sharded(models), weights)
        for i, model in enumerate(models):
            model.module.load_state_dict(state[f"model{i}"])
    else:
        for name, parameter in models[0].module.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    Path(folder).mkdir(exist_ok=True)
    dist_checkpointing.save(sharded(models), folder)


def make(folder: Path, layout: Layout | None = None, weights: Path | None = None) -> Path:
    """A checkpoint saved by the ranks of `layout`: new weights, or those of the checkpoint `weights`."""
    layout = layout or Layout()
    run_ranks(layout.world, _save, layout, str(weights) if weights else None, str(folder))
    architecture(layout).write(folder)
    return folder


def error_line(result: subprocess.CompletedProcess) -> str:
    """The one line of a refusal."""
    assert result.returncode == 2, result.stderr[-3000:]
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr[-3000:]
    return lines[0]
