"""A run under a dense teacher: the same losses at any layout of student and teacher, and refusals."""

import json
import sys
from pathlib import Path

import pytest
import torch
from runs import ROOT, distill, run, steps
from transformers import LlamaConfig, LlamaForCausalLM

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
    return steps(out)


def test_the_kl_to_the_teacher_and_the_distance_fall_and_are_logged(alone):
    for name in ("teacher_kl", "hidden_loss"):
        values = [line[name] for line in alone]
        assert len(values) == 4 and values[-1] < values[0]


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (2, ["--tensor-model-parallel-size=2", *HIDDEN]),
        (2, ["--context-parallel-size=2", "--teacher-shards=2", *HIDDEN]),
        (2, ["--teacher-shards=2", *HIDDEN]),
    ],
    ids=["tp2", "cp2-teacher2", "dp2-teacher2"],
)
def test_every_layout_takes_the_same_steps(alone, teacher, tmp_path, ranks, flags):
    result = distill(tmp_path, "--teacher", str(teacher), *flags, ranks=ranks, recipe=RECIPE)
    assert result.returncode == 0, result.stderr[-3000:]
    for expected, actual in zip(alone, steps(tmp_path), strict=True):
        for name in ("lm_loss", "teacher_kl", "hidden_loss", "grad_norm"):
            assert actual[name] == pytest.approx(expected[name], abs=1e-4), (name, actual["step"])


def test_a_short_distillation_on_real_text_lowers_the_kl(teacher_of_bytes, tmp_path):
    """The text is this project's own documentation, the teacher's tokenizer the run's."""
    text = [str(path) for path in (ROOT / "docs").glob("*.md")]
    prefix, kind = str(tmp_path / "data"), ["--tokenizer-type", "HuggingFaceTokenizer"]
    tokenizer = [*kind, "--tokenizer-model", str(teacher_of_bytes)]
    tool = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--output-prefix", prefix]
    made = run([*tool, "--input", *text, "--workers", "1", *tokenizer])
    assert made.returncode == 0, made.stderr[-3000:]
    (tmp_path / "recipe.yaml").write_text(RECIPE.read_text().replace("  mock_data: true\n", ""))
    words = ["--teacher", str(teacher_of_bytes), *tokenizer, "--data-path", prefix, "--split", "90,10,0"]
    words += ["--train-iters", "40", "--lr", "1e-2", "--teacher-temperature", "1"]
    result = distill(tmp_path / "out", *words, recipe=tmp_path / "recipe.yaml")
    assert result.returncode == 0, result.stderr[-3000:]
    kl = [line["teacher_kl"] for line in steps(tmp_path / "out")]
    assert sum(kl[-5:]) < 0.8 * sum(kl[:5])


@pytest.mark.slow
def test_pipeline_stages_get_their_targets(teacher, tmp_path):
    """Four ranks, TP2 x PP2 with the teacher over all four, against one rank alone; no hidden states."""
    flags = ["--tensor-model-parallel-size=2", "--pipeline-model-parallel-size=2", "--teacher-shards=4"]
    for name, words, ranks in (("one", [], 1), ("four", flags, 4)):
        result = distill(tmp_path / name, "--teacher", str(teacher), *words, ranks=ranks, recipe=RECIPE)
        assert result.returncode == 0, result.stderr[-3000:]
    for expected, actual in zip(steps(tmp_path / "one"), steps(tmp_path / "four"), strict=True):
        for name in ("lm_loss", "teacher_kl", "grad_norm"):
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
    from megatron_clsa.errors import UserError
    from megatron_clsa.training.arguments import parse_command
    from megatron_clsa.training.plan import make_plan
    from megatron_clsa.training.recipe import load_recipe

    words = ["--config", str(RECIPE), "--out", str(tmp_path / "out"), "--teacher", str(teacher), *words]
    with pytest.raises(UserError, match=named):
        make_plan(load_recipe(RECIPE), parse_command(words), words, 1)


def test_a_teachers_flags_without_a_teacher_are_refused(tmp_path):
    result = distill(tmp_path, "--config", str(RECIPE), recipe=RECIPE)
    assert result.returncode == 2 and "needs a teacher" in result.stderr.strip().splitlines()[-1]


def test_a_broken_teacher_config_is_refused(teacher, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 140})[:-3])
    result = distill(tmp_path / "out", "--teacher", str(tmp_path), recipe=RECIPE)
    assert result.returncode == 2 and "is not JSON" in result.stderr.strip().splitlines()[-1]
