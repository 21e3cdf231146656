"""The recipes in examples/: each fits its GPUs at every number of ranks that it names, as the docs say."""

import pytest
from runs import ROOT

from megatron_clsa.estimate import memory, parameters
from megatron_clsa.estimate.speed import Machine, predict
from megatron_clsa.training.arguments import parse_command
from megatron_clsa.training.dry_run import run_shape
from megatron_clsa.training.plan import make_plan
from megatron_clsa.training.recipe import load_recipe

RECIPES = ROOT / "examples" / "recipes"
PLANNED = {"clsa_100m": 98.8e6, "paper_4b": 3.02e9, "clsa_7b": 7.12e9, "clsa_70b": 69.9e9}
CASES = [(name, ranks) for name in PLANNED for ranks in load_recipe(RECIPES / f"{name}.yaml").layouts]


def _shapes(name: str, ranks: int) -> list:
    """(phase, its shape) of every phase of a recipe."""
    path = RECIPES / f"{name}.yaml"
    words = ["--config", str(path), "--dry-run", str(ranks)]
    plan = make_plan(load_recipe(path), parse_command(words), words, ranks)
    return [(run, run_shape(run.args, run.config)) for run in plan.runs]


def _table_row(name: str, ranks: int, shapes: list) -> str:
    """A line of docs/recipes.md."""
    sizes = dict.fromkeys(f"TP{s.tp} PP{s.pp} CP{s.cp} DP{s.dp}" for _, s in shapes)
    peak = max(memory.peak(shape) for _, shape in shapes) / 2**30
    predictions = [(predict(shape, Machine()), run.steps) for run, shape in shapes]
    days = sum(prediction.seconds * steps for prediction, steps in predictions) / 86400
    mfu = " ".join(f"{prediction.mfu:.0%}" for prediction, _ in predictions)
    return f"| {name} | {ranks} | {', '.join(sizes)} | {peak:.1f} | {mfu} | {days:,.2f} |"


@pytest.mark.parametrize("name, ranks", CASES)
def test_recipe_fits_the_ranks_that_it_names(name, ranks):
    shapes = _shapes(name, ranks)
    assert [run.phase.name for run, _ in shapes] == ["dense_short", "dense_long", "warmup", "sparse"]
    for run, shape in shapes:
        assert memory.peak(shape) < memory.USABLE, f"{run.phase.name}: {memory.peak(shape) / 2**30:.1f} GiB"
        assert parameters.total(shape) == pytest.approx(PLANNED[name], rel=0.01)
    row = _table_row(name, ranks, shapes)
    assert row in (ROOT / "docs" / "recipes.md").read_text(), f"docs/recipes.md should hold\n{row}"


@pytest.mark.parametrize("ranks", [16, 128])
@pytest.mark.parametrize("name", PLANNED)
def test_recipe_fits_between_the_numbers_that_it_names(name, ranks):
    if ranks < min(load_recipe(RECIPES / f"{name}.yaml").layouts):
        pytest.skip("the model does not fit on so few")
    for run, shape in _shapes(name, ranks):
        assert memory.peak(shape) < memory.USABLE, f"{run.phase.name}: {memory.peak(shape) / 2**30:.1f} GiB"


def test_every_planned_recipe_names_its_ranks():
    assert {name: sorted(r for n, r in CASES if n == name) for name in PLANNED} == {
        "clsa_100m": [8, 64, 512],
        "paper_4b": [8, 64, 512],
        "clsa_7b": [8, 64, 512],
        "clsa_70b": [64, 512],
    }


def test_70b_does_not_fit_on_eight_gpus_as_its_recipe_says(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    text = (RECIPES / "clsa_70b.yaml").read_text()
    recipe.write_text(
        text.replace("  64: {tensor_model_parallel_size: 8,", "  8: {tensor_model_parallel_size: 8,")
    )
    words = ["--config", str(recipe), "--dry-run", "8", "--pipeline-model-parallel-size=1"]
    plan = make_plan(load_recipe(recipe), parse_command(words), words, 8)
    shape = run_shape(plan.runs[0].args, plan.runs[0].config)
    assert sum(memory.static(shape, shape.stage(0)).values()) > 80e9
