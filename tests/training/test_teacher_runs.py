"""A run under a dense teacher: the same losses at any layout of student and teacher, and refusals."""

import json
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import yaml
from runs import ROOT, distill, metrics, run, steps
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_clsa.errors import UserError
from megatron_clsa.training.arguments import parse_command
from megatron_clsa.training.plan import make_plan
from megatron_clsa.training.recipe import load_recipe
from megatron_clsa.training.teacher_flags import uses_teacher

sys.path.append(str(ROOT / "tests" / "evaluate"))
from eval_folder import byte_tokenizer

RECIPE = Path(__file__).parent / "tiny_teacher.yaml"
HIDDEN = ("--teacher-hidden-coeff", "0.5", "--teacher-layer-map", "2:2,4:4")


def _save_teacher(folder: Path, vocabulary: int) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return _save_teacher(tmp_path_factory.mktemp("teacher"), 140)


@pytest.fixture
def teacher_of_bytes(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "teacher")
    return _save_teacher(tmp_path / "teacher", 260)


@pytest.fixture(scope="module")
def alone(teacher, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    result = distill(out, "--teacher", str(teacher), *HIDDEN, recipe=RECIPE)
    assert result.returncode == 0, result.stderr[-3000:]
    return out


def test_the_kl_to_the_teacher_and_the_distance_fall_and_are_logged(alone):
    for name in ("teacher_kl", "hidden_loss"):
        values = [line[name] for line in steps(alone)]
        assert len(values) == 4 and values[-1] < values[0]
    measured = [line["valid_teacher_kl"] for line in metrics(alone) if "valid_lm_loss" in line]
    assert len(measured) == 2 and measured[-1] < measured[0]


def lines_of(out: Path) -> list[dict]:
    lines = metrics(out)
    assert sum("valid_teacher_kl" in line for line in lines) == 2
    return lines


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (2, ["--tensor-model-parallel-size=2", *HIDDEN]),
        (2, ["--context-parallel-size=2", "--teacher-shards=2", *HIDDEN]),
        (2, ["--teacher-shards=2", *HIDDEN]),
        (2, ["--teacher-tensor-parallel-size=2", *HIDDEN]),
        (2, ["--tensor-model-parallel-size=2", "--teacher-tensor-parallel-size=2", *HIDDEN]),
    ],
    ids=["tp2", "cp2-teacher2", "dp2-teacher2", "dp2-teacher-tp2", "tp2-teacher-tp2"],
)
def test_every_layout_takes_the_same_steps(alone, teacher, tmp_path, ranks, flags):
    result = distill(tmp_path, "--teacher", str(teacher), *flags, ranks=ranks, recipe=RECIPE)
    assert result.returncode == 0, result.stderr[-3000:]
    for expected, actual in zip(lines_of(alone), lines_of(tmp_path), strict=True):
        for name in {"lm_loss", "teacher_kl", "hidden_loss", "valid_lm_loss", "valid_teacher_kl"} & set(
            expected
        ):
            assert actual[name] == pytest.approx(expected[name], abs=1e-5), (name, actual["step"])
        if "grad_norm" in expected:
            assert actual["grad_norm"] == pytest.approx(expected["grad_norm"], abs=1e-4), actual["step"]


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


@pytest.fixture(scope="module")
def alone_without_states(teacher, tmp_path_factory):
    out = tmp_path_factory.mktemp("without_states")
    result = distill(out, "--teacher", str(teacher), recipe=RECIPE)
    assert result.returncode == 0, result.stderr[-3000:]
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (4, ["--tensor-model-parallel-size=2", "--teacher-shards=4"]),
        (2, ["--num-layers-per-virtual-pipeline-stage=1", "--teacher-shards=2"]),
        (2, ["--teacher-tensor-parallel-size=2"]),
    ],
    ids=["tp2-pp2-teacher4", "pp2-interleaved-teacher2", "pp2-teacher-tp2"],
)
def test_pipeline_stages_get_their_targets(alone_without_states, teacher, tmp_path, ranks, flags):
    words = ["--teacher", str(teacher), "--pipeline-model-parallel-size=2", *flags]
    result = distill(tmp_path, *words, ranks=ranks, recipe=RECIPE)
    assert result.returncode == 0, result.stderr[-3000:]
    for expected, actual in zip(metrics(alone_without_states), metrics(tmp_path), strict=True):
        for name in {"lm_loss", "teacher_kl", "grad_norm", "valid_teacher_kl"} & set(expected):
            assert actual[name] == pytest.approx(expected[name], abs=1e-4), (name, actual["step"])


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--teacher", "nowhere"], "--teacher nowhere has no config.json"),
        (["--teacher-top-k", "0"], "--teacher-top-k 0"),
        (["--teacher-temperature", "0"], "--teacher-temperature 0"),
        (["--teacher-shards", "2"], "--teacher-shards 2 does not divide 1"),
        (["--teacher-loss-coeff", "0"], "--lm-loss-coeff 0.0 needs a teacher"),
        (["--lm-loss-coeff", "-1"], "--lm-loss-coeff -1"),
        (["--seq-length", "256"], "reads 128 tokens"),
        (["--vocab-size", "150"], "has 140 tokens"),
        (["--teacher-hidden-coeff", "1"], "--teacher-layer-map"),
        (["--teacher-hidden-coeff", "1", "--teacher-layer-map", "4:5"], "4:5"),
        (
            ["--teacher-hidden-coeff", "1", "--teacher-layer-map", "4:4", "--hidden-size", "64"],
            "hidden size|--hidden-size",
        ),
        (["--trainable", "indexer", "--kd-loss", "full"], "--lm-loss-coeff 0.0 needs a teacher"),
    ],
)
def test_bad_flags_are_refused_before_anything_starts(teacher, tmp_path, words, named):
    words = ["--config", str(RECIPE), "--out", str(tmp_path / "out"), "--teacher", str(teacher), *words]
    with pytest.raises(UserError, match=named):
        make_plan(load_recipe(RECIPE), parse_command(words), words, 1)


@pytest.mark.parametrize(
    ("sizes", "words", "named"),
    [
        ({}, ["--teacher-tensor-parallel-size", "3"], "3 does not divide 4 ranks"),
        ({}, ["--teacher-tensor-parallel-size", "0"], "--teacher-tensor-parallel-size 0"),
        ({}, ["--teacher-tensor-parallel-size", "4"], "num_key_value_heads 2"),
        ({"num_attention_heads": 1, "num_key_value_heads": 1}, [], "num_attention_heads 1"),
        ({"vocab_size": 141}, [], "vocab_size 141"),
        ({"intermediate_size": 47}, [], "intermediate_size 47"),
        ({"model_type": "gpt2"}, [], "no tensor-parallel plan for gpt2"),
        ({"model_type": "unheard-of"}, [], "unheard-of"),
        ({}, ["--teacher-shards", "2"], "set one of them"),
    ],
)
def test_teacher_sizes_that_do_not_fit_are_refused(teacher, tmp_path, sizes, words, named):
    config = json.loads((teacher / "config.json").read_text()) | sizes
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    start = ["--teacher", str(tmp_path), "--teacher-tensor-parallel-size", "2"]
    words = ["--config", str(RECIPE), "--out", str(tmp_path / "out"), *start, *words]
    with pytest.raises(UserError, match=named):
        make_plan(load_recipe(RECIPE), parse_command(words), words, 4)


def test_a_teacher_without_weights_ends_with_one_line(teacher, tmp_path):
    (tmp_path / "config.json").write_text((teacher / "config.json").read_text())
    result = distill(tmp_path / "out", "--teacher", str(tmp_path), recipe=RECIPE)
    assert result.returncode == 2 and "holds no weights" in result.stderr.strip().splitlines()[-1]


def test_the_dense_models_recipe_heals_under_the_teacher_and_warms_up_without_it(teacher):
    recipe = ROOT / "examples" / "recipes" / "from_dense.yaml"
    words = ["--config", str(recipe), "--dry-run", "8", "--teacher", str(teacher)]
    runs = make_plan(load_recipe(recipe), parse_command(words), words, 8).runs
    assert [(run.phase.name, uses_teacher(run.args)) for run in runs] == [
        ("heal", True), ("warmup", False), ("sparse", True)
    ]  # fmt: skip


def test_a_teachers_flags_without_a_teacher_are_refused(tmp_path):
    result = distill(tmp_path, "--config", str(RECIPE), recipe=RECIPE)
    assert result.returncode == 2 and "needs a teacher" in result.stderr.strip().splitlines()[-1]


def test_a_broken_teacher_config_is_refused(teacher, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 140})[:-3])
    result = distill(tmp_path / "out", "--teacher", str(tmp_path), recipe=RECIPE)
    assert result.returncode == 2 and "is not JSON" in result.stderr.strip().splitlines()[-1]
