"""From a dense model to generated text: start, two steps of each phase, export, reload, generate."""

import sys
from pathlib import Path

import pytest
import yaml
from checkpoints import ROOT, error_line
from dense_models import byte_tokenizer, dense_model
from tools_here import from_hf, to_hf

sys.path.insert(0, str(ROOT / "tests" / "training"))
from runs import distill, steps

SMALL = ("--sliding-window", 8, "--index-topk", 12, "--index-head-dim", 8)
TEXT = ("--calibration-tokens", 2048, "--calibration-length", 64)
STEPS = {"seq_length": 64, "train_iters": 2, "micro_batch_size": 1, "global_batch_size": 2, "lr": 1e-3}
PHASES = [
    {"name": "dense", "cross_attention": "dense", "trainable": "backbone"},
    {"name": "warmup", "cross_attention": "dense", "kd_loss": "full", "trainable": "indexer"},
    {"name": "sparse", "cross_attention": "sparse", "kd_loss": "selected"},
]


def _start(folder: Path, family: str, groups: int, tied: bool) -> tuple[Path, Path]:
    """A dense folder and the start made from it."""
    dense, start = folder / "dense", folder / "start"
    dense_model(family, groups, tied).save_pretrained(dense)
    byte_tokenizer(dense)
    result = from_hf("--init-from", family, dense, start, *SMALL, *TEXT)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "loss a token of held-out text, start" in result.stdout
    return dense, start


def _recipe(start: Path) -> Path:
    """The start's own model.yaml with phases under it."""
    recipe = yaml.safe_load((start / "model.yaml").read_text())
    recipe["data"] |= {"mock_data": True, "num_workers": 0}
    recipe["evaluation"] = {"eval_iters": 1}
    recipe["phases"] = [phase | STEPS for phase in PHASES]
    path = start.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def _name(family: str, groups: int, tied: bool) -> str:
    return f"{family}-{'mha' if groups == 4 else 'gqa'}-{'tied' if tied else 'untied'}"


QUICK = [("llama", 2, False), ("llama", 4, True), ("qwen3", 2, True), ("qwen3", 4, False)]
OTHERS = [("llama", 2, True), ("llama", 4, False), ("qwen3", 2, False), ("qwen3", 4, True)]
TP2 = ("qwen2", 2, True, ["--tensor-model-parallel-size", "2"])


@pytest.mark.parametrize(
    "family, groups, tied, layout",
    [
        *(pytest.param(*case, [], id=_name(*case)) for case in QUICK),
        *(pytest.param(*case, [], id=_name(*case), marks=pytest.mark.slow) for case in OTHERS),
        pytest.param(*TP2, id="qwen2-biases-tp2"),
    ],
)
def test_a_dense_model_trains_through_all_phases_and_generates(tmp_path, family, groups, tied, layout):
    _, start = _start(tmp_path, family, groups, tied)
    run = tmp_path / "run"
    flags = ["--pretrained-checkpoint", str(start), *layout]
    result = distill(run, *flags, ranks=2 if layout else 1, recipe=_recipe(start))
    assert result.returncode == 0, result.stderr[-3000:]
    assert [line["phase"] for line in steps(run)] == [name for p in PHASES for name in [p["name"]] * 2]
    exported = to_hf(run, tmp_path / "hf", "--verify")
    assert exported.returncode == 0, exported.stderr[-3000:]
    assert "verified" in exported.stdout
    _generates(tmp_path / "hf")


def _generates(folder: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    prompt = tokenizer("def index(self, key): return self", return_tensors="pt").input_ids
    out = model.generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert out.shape[1] == prompt.shape[1] + 5


def test_another_architecture_is_refused_before_anything_starts(tmp_path):
    _, start = _start(tmp_path, "llama", 2, False)
    flags = ("--pretrained-checkpoint", str(start), "--ffn-hidden-size", "64")
    line = error_line(distill(tmp_path / "run", *flags, recipe=_recipe(start)))
    assert "ffn_hidden_size is 48" in line and "64" in line and not (tmp_path / "run").exists()
