"""A run under a dense teacher: its figures fall and are logged, the same at any layout of either.

Gradients at any layout: tests/distill/test_teacher_step.py. Refusals: test_teacher_refusals.py.
"""

import sys
import sysconfig
from pathlib import Path

import pytest
import yaml
from runs import ROOT, distill, metrics, run, steps
from teachers import save_teacher

from megatron_clsa.training.arguments import parse_command
from megatron_clsa.training.plan import make_plan
from megatron_clsa.training.recipe import load_recipe
from megatron_clsa.training.teacher_flags import uses_teacher

sys.path.append(str(ROOT / "tests" / "evaluate"))
from eval_folder import byte_tokenizer

RECIPE = Path(__file__).parent / "tiny_teacher.yaml"
TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
LOSSES = {"lm_loss", "teacher_kl", "hidden_loss", "valid_lm_loss", "valid_teacher_kl"}
HIDDEN = ("--teacher-hidden-coeff", "0.5", "--teacher-layer-map", "2:2,4:4")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"), 140)


@pytest.fixture
def teacher_of_bytes(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "teacher")
    return save_teacher(tmp_path / "teacher", 260)


@pytest.fixture(scope="module")
def alone(teacher, tmp_path_factory):
    """A run on one rank: its folder, with what it printed in `log`."""
    out = tmp_path_factory.mktemp("alone")
    result = distill(out, "--teacher", str(teacher), *HIDDEN, recipe=RECIPE)
    assert result.returncode == 0, result.stderr[-3000:]
    (out / "log").write_text(result.stdout)
    return out


def test_the_kl_to_the_teacher_and_the_distance_fall_and_are_logged(alone):
    for name in ("teacher_kl", "hidden_loss"):
        values = [line[name] for line in steps(alone)]
        assert len(values) == 4 and values[-1] < values[0]
    measured = [line["valid_teacher_kl"] for line in metrics(alone) if "valid_lm_loss" in line]
    assert len(measured) == 2 and measured[-1] < measured[0]


def test_the_lines_on_the_screen_name_the_kl(alone):
    log = (alone / "log").read_text()
    for line in metrics(alone):
        if "valid_teacher_kl" in line:
            assert f" valid_teacher_kl {line['valid_teacher_kl']:.4f}" in log
    assert f" teacher KL {steps(alone)[-1]['teacher_kl']:.4f} " in log


def lines_of(out: Path) -> list[dict]:
    lines = metrics(out)
    assert sum("valid_teacher_kl" in line for line in lines) == 2
    return lines


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        pytest.param(2, ["--teacher-tensor-parallel-size=2"], id="dp2-teacher-tp2"),
        pytest.param(2, [f"{TP}=2"], id="tp2", marks=pytest.mark.slow),
        pytest.param(2, [f"{PP}=2", "--teacher-tensor-parallel-size=2"], id="pp2-teacher-tp2"),
        pytest.param(
            2, ["--context-parallel-size=2", "--teacher-shards=2"], id="cp2-teacher2", marks=pytest.mark.slow
        ),
        pytest.param(
            2,
            [f"{PP}=2", "--num-layers-per-virtual-pipeline-stage=1", "--teacher-shards=2"],
            id="pp2-interleaved-teacher2",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            4, [f"{TP}=2", f"{PP}=2", "--teacher-shards=4"], id="tp2-pp2-teacher4", marks=pytest.mark.slow
        ),
    ],
)
def test_every_layout_takes_the_same_steps(alone, teacher, tmp_path, ranks, flags):
    result = distill(tmp_path, "--teacher", str(teacher), *HIDDEN, *flags, ranks=ranks, recipe=RECIPE)
    assert result.returncode == 0, result.stderr[-3000:]
    for expected, actual in zip(lines_of(alone), lines_of(tmp_path), strict=True):
        for name in LOSSES & expected.keys():
            assert actual[name] == pytest.approx(expected[name], abs=1e-5), (name, actual["step"])
        if "grad_norm" in expected:
            assert actual["grad_norm"] == pytest.approx(expected["grad_norm"], abs=1e-4), actual["step"]


@pytest.mark.slow
def test_a_run_that_stopped_goes_on_as_if_it_had_not(alone, teacher, tmp_path):
    words = ["--teacher", str(teacher), *HIDDEN, "--save-interval", "2"]
    assert distill(tmp_path, *words, "--exit-interval", "2", recipe=RECIPE).returncode == 75
    assert len(steps(tmp_path)) == 2
    assert distill(tmp_path, *words, recipe=RECIPE).returncode == 0
    for expected, actual in zip(lines_of(alone), lines_of(tmp_path), strict=True):
        for name in LOSSES & expected.keys():
            assert actual[name] == expected[name], (name, actual["step"])


def _tool(name: str, *words) -> None:
    done = run([sys.executable, str(ROOT / "tools" / name), *map(str, words)])
    assert done.returncode == 0, done.stderr[-3000:]


def _from_dense_recipe(start: Path) -> Path:
    """The start's own model.yaml and, under it, the tiny recipe's phases."""
    recipe, tiny = (yaml.safe_load(path.read_text()) for path in (start / "model.yaml", RECIPE))
    recipe["data"] |= {"split": "90,10,0", "num_workers": 0}
    recipe |= {"evaluation": tiny["evaluation"], "phases": tiny["phases"]}
    path = start.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_a_start_from_a_dense_model_comes_closer_to_it_on_real_text(teacher_of_bytes, tmp_path):
    """The text is of Python's standard library; teacher and start are one dense model."""
    start, prefix = tmp_path / "start", tmp_path / "data"
    sizes = ["--sliding-window", 8, "--index-topk", 16, "--index-head-dim", 8, "--memory-init", "mean"]
    _tool("from_hf.py", "--init-from", "llama", teacher_of_bytes, start, *sizes)
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", teacher_of_bytes]
    text = Path(sysconfig.get_path("stdlib")).glob("[ab]*.py")
    _tool("preprocess_data.py", "--input", *text, "--output-prefix", prefix, "--workers", 1, *tokenizer)
    words = ["--pretrained-checkpoint", start, "--teacher", teacher_of_bytes, "--data-path", prefix]
    words += ["--train-iters", 40, "--teacher-temperature", 1]
    result = distill(tmp_path / "out", *map(str, words), recipe=_from_dense_recipe(start))
    assert result.returncode == 0, result.stderr[-3000:]
    kl = [line["teacher_kl"] for line in steps(tmp_path / "out")]
    assert sum(kl[-5:]) < 0.8 * sum(kl[:5])
    held_out = [line["valid_teacher_kl"] for line in metrics(tmp_path / "out") if "valid_lm_loss" in line]
    assert held_out[-1] < 0.8 * held_out[0]


def test_the_dense_models_recipe_heals_under_the_teacher_and_warms_up_without_it(teacher):
    recipe = ROOT / "examples" / "recipes" / "from_dense.yaml"
    words = ["--config", str(recipe), "--dry-run", "8", "--teacher", str(teacher)]
    runs = make_plan(load_recipe(recipe), parse_command(words), words, 8).runs
    assert [(run.phase.name, uses_teacher(run.args)) for run in runs] == [
        ("heal", True), ("warmup", False), ("sparse", True)
    ]  # fmt: skip
