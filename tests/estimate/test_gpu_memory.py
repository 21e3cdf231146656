"""The estimated peak memory of a rank against what the allocator reports, on one GPU."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from runs import distill, metrics

from megatron_clsa.training.arguments import parse_command
from megatron_clsa.training.dry_run import run_shape
from megatron_clsa.training.plan import make_plan
from megatron_clsa.training.recipe import load_recipe

RECIPE = Path(__file__).parent / "gpu_memory.yaml"
VARIANTS = {
    "transformer_engine": [],
    "local": ["--transformer-impl", "local", "--no-rope-fusion", "--no-persist-layer-norm"],
    "recompute": ["--recompute-granularity=full", "--recompute-method=uniform", "--recompute-num-layers=1"],
}


def _plan(name):
    words = ["--config", str(RECIPE), *VARIANTS[name]]
    return make_plan(load_recipe(RECIPE), parse_command(words), words, ranks=1)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_recipe_is_taken(name):
    assert [run.phase.name for run in _plan(name).runs] == ["dense", "warmup", "sparse"]


@pytest.mark.gpu
@pytest.mark.te
@pytest.mark.parametrize("name", VARIANTS)
def test_memory_is_within_a_tenth_of_the_measured_peak(tmp_path, name):
    from megatron_clsa.estimate import memory

    result = distill(tmp_path, *VARIANTS[name], recipe=RECIPE)
    assert result.returncode == 0, result.stderr[-3000:]
    off = {}
    for run in _plan(name).runs:
        phase = run.phase.name
        lines = [line for line in metrics(tmp_path) if line["phase"] == phase and "lm_loss" in line]
        measured = max(line["peak_memory_bytes"] for line in lines)
        parts = memory.of_stage(run_shape(run.args, run.config), 0)
        off[phase] = sum(parts.values()) / measured
        print(
            f"{name} {phase}: measured {measured:,} estimated {sum(parts.values()):,.0f}", parts, flush=True
        )
    assert all(0.9 <= ratio <= 1.1 for ratio in off.values()), off
