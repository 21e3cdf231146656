"""A teacher that cannot work: one line that names flag or file, exit code 2, nothing written."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from runs import ROOT, command, distill
from safetensors.torch import load_file, save_file
from teachers import save_teacher

from megatron_clsa.errors import UserError
from megatron_clsa.launch import launch
from megatron_clsa.training import teacher_checks
from megatron_clsa.training.arguments import parse_command
from megatron_clsa.training.plan import make_plan
from megatron_clsa.training.recipe import load_recipe
from megatron_clsa.training.run import main

sys.path.append(str(ROOT / "tests" / "evaluate"))
from eval_folder import byte_tokenizer

RECIPE = Path(__file__).parent / "tiny_teacher.yaml"
TEACHER_TP = "--teacher-tensor-parallel-size"


@pytest.fixture(scope="module")
def whole_teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"), 140)


@pytest.fixture
def teacher(whole_teacher, tmp_path):
    """One of its own, to be damaged."""
    return Path(shutil.copytree(whole_teacher, tmp_path / "teacher"))


def _change(teacher: Path, **fields) -> None:
    path = teacher / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _refusal(capsys, out: Path, *flags: str) -> str:
    """The one line that the command says, in this process."""
    capsys.readouterr()
    words = command(out, *map(str, flags), recipe=RECIPE)
    code, (stdout, stderr) = launch(main, words[1], words[2:]), capsys.readouterr()
    lines = stderr.splitlines()
    assert code == 2 and not stdout and len(lines) == 1 and lines[0].startswith("error: "), stdout + stderr
    assert not out.exists()
    return lines[0]


FLAGS = {
    "missing folder": (["--teacher", "nowhere"], "--teacher nowhere has no config.json"),
    "no tokens": (["--teacher-top-k", "0"], "--teacher-top-k 0"),
    "more tokens than there are": (["--teacher-top-k", "129"], "--teacher-top-k 129 is more than"),
    "temperature 0": (["--teacher-temperature", "0"], "--teacher-temperature 0"),
    "temperature below 0": (["--teacher-temperature=-1"], "--teacher-temperature -1"),
    "temperature no number": (["--teacher-temperature", "nan"], "--teacher-temperature nan"),
    "shards over ranks": (["--teacher-shards", "2"], "--teacher-shards 2 does not divide 1"),
    "TP over ranks": ([TEACHER_TP, "2"], f"{TEACHER_TP} 2 does not divide 1"),
    "nothing to learn": (["--teacher-loss-coeff", "0"], "--lm-loss-coeff 0.0 needs a teacher"),
    "coefficient below 0": (["--lm-loss-coeff", "-1"], "--lm-loss-coeff -1"),
    "sequence too long": (["--seq-length", "256"], "reads 128 tokens"),
    "vocabulary too small": (["--vocab-size", "150"], "has 140 tokens, the tokenizer 150"),
    "no layer map": (["--teacher-hidden-coeff", "1"], "--teacher-layer-map"),
    "layer 5 of 4": (["--teacher-hidden-coeff", "1", "--teacher-layer-map", "4:5"], "4:5"),
    "layer 0": (["--teacher-hidden-coeff", "1", "--teacher-layer-map", "0:1"], "0:1"),
    "layer named twice": (["--teacher-hidden-coeff", "1", "--teacher-layer-map", "2:2,2:3"], "twice"),
    "other width": (
        ["--teacher-hidden-coeff", "1", "--teacher-layer-map", "4:4", "--hidden-size", "64"],
        "--hidden-size is 64",
    ),
    "indexer alone": (["--trainable", "indexer", "--kd-loss", "full"], "--lm-loss-coeff 0.0 needs a teacher"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_a_bad_flag(name, whole_teacher, tmp_path, capsys):
    flags, named = FLAGS[name]
    assert named in _refusal(capsys, tmp_path / "out", "--teacher", whole_teacher, *flags)


def test_a_machine_without_transformers(whole_teacher, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(teacher_checks, "find_spec", lambda name: None)
    line = _refusal(capsys, tmp_path / "out", "--teacher", whole_teacher)
    assert "pip install 'megatron_clsa[hf]'" in line


def test_flags_of_a_teacher_without_one(tmp_path, capsys):
    assert "needs a teacher" in _refusal(capsys, tmp_path / "out")


def _cut(path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])


FOLDERS = {
    "config cut": (lambda t: _cut(t / "config.json", 0.9), "config.json cannot be read"),
    "no weights": (lambda t: (t / "model.safetensors").unlink(), "has no model.safetensors"),
    "weights cut": (lambda t: _cut(t / "model.safetensors", 0.5), "model.safetensors is missing or damaged"),
    "unknown family": (lambda t: _change(t, model_type="unheard-of"), "unheard-of"),
    "no language model": (lambda t: _change(t, model_type="vit"), "vit is no causal language model"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_bad_folder(name, teacher, tmp_path, capsys):
    damage, named = FOLDERS[name]
    damage(teacher)
    assert named in _refusal(capsys, tmp_path / "out", "--teacher", teacher)


SIZES = {
    "ranks": ({}, ["3"], "3 does not divide 4 ranks"),
    "none": ({}, ["0"], f"{TEACHER_TP} 0"),
    "key-value heads": ({}, ["4"], "num_key_value_heads 2"),
    "heads": ({"num_attention_heads": 1, "num_key_value_heads": 1}, ["2"], "num_attention_heads 1"),
    "vocabulary": ({"vocab_size": 141}, ["2"], "vocab_size 141"),
    "MLP": ({"intermediate_size": 47}, ["2"], "intermediate_size 47"),
    "no plan": ({"model_type": "gpt2"}, ["2"], "no tensor-parallel plan for gpt2"),
    "both": ({}, ["2", "--teacher-shards", "2"], "set one of them"),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_that_do_not_fit_a_world_of_four(name, teacher, tmp_path):
    changes, size, named = SIZES[name]
    _change(teacher, **changes)
    words = ["--config", str(RECIPE), "--out", str(tmp_path / "out"), "--teacher", str(teacher), TEACHER_TP]
    words += size
    with pytest.raises(UserError, match=named):
        make_plan(load_recipe(RECIPE), parse_command(words), words, 4)


def test_another_tokenizer_with_as_many_tokens(tmp_path, capsys):
    teacher = save_teacher(tmp_path / "teacher", 260)
    byte_tokenizer().save_pretrained(teacher)
    mine = Path(shutil.copytree(teacher, tmp_path / "mine"))
    content = json.loads((mine / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (mine / "tokenizer.json").write_text(json.dumps(content))
    flags = ["--teacher", teacher, "--tokenizer-type=HuggingFaceTokenizer", "--tokenizer-model", mine]
    line = _refusal(capsys, tmp_path / "out", *flags)
    assert "has another tokenizer: token" in line and "is 'a', in" in line and "it is 'b'" in line


def test_a_missing_tensor_is_not_made_up(teacher, tmp_path):
    path = teacher / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    result = distill(tmp_path / "out", "--teacher", str(teacher), recipe=RECIPE)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2 and "lacks model.layers.2.mlp.up_proj.weight" in last, result.stderr
