"""The whole path of one dense model, in a process of its own: start, all phases under it, export, text.

For test_dense_families.py; owns no test. A forked server imports the libraries once for all models.
"""

import json
import multiprocessing
import os
import traceback
from pathlib import Path

import yaml
from dense_models import byte_tokenizer, dense_model
from tools_here import from_hf, to_hf

from megatron_clsa.convert.architecture import read_architecture

SMALL = ("--sliding-window", 8, "--index-topk", 12, "--index-head-dim", 8)
TEXT = ("--calibration-tokens", 2048, "--calibration-length", 64)
STEPS = {"seq_length": 64, "train_iters": 2, "micro_batch_size": 1, "global_batch_size": 2, "lr": 1e-3}
PHASES = [
    {"name": "heal", "cross_attention": "dense", "trainable": "backbone", "lm_loss_coeff": 0.0,
     "teacher_hidden_coeff": 0.3, "teacher_layer_map": "2:2,4:4"},
    {"name": "warmup", "cross_attention": "dense", "kd_loss": "full", "trainable": "indexer"},
    {"name": "sparse", "cross_attention": "sparse", "kd_loss": "selected"},
]  # fmt: skip
PRELOAD = ["megatron_clsa.parallel.cpu", "megatron_clsa.training.run", "transformers"]


def _recipe(start: Path, dense: Path) -> Path:
    """The start's own model.yaml, with its teacher and phases under it."""
    recipe = yaml.safe_load((start / "model.yaml").read_text())
    recipe["data"] |= {"mock_data": True, "num_workers": 0}
    recipe["teacher"] = {"teacher": str(dense), "teacher_top_k": 16, "teacher_dtype": "fp32"}
    recipe["evaluation"] = {"eval_iters": 1}
    recipe["phases"] = [phase | STEPS for phase in PHASES]
    path = start.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def _walk(folder: Path, family: str, groups: int, tied: bool) -> int:
    """Every step must succeed; returns the number of tokens that the exported model wrote."""
    from megatron_clsa.launch import train

    dense, start, run = folder / "dense", folder / "start", folder / "run"
    dense_model(family, groups, tied).save_pretrained(dense)
    byte_tokenizer(dense)
    made = from_hf("--init-from", family, dense, start, *SMALL, *TEXT)
    assert made.returncode == 0, made.stderr
    recipe = _recipe(start, dense)
    assert train(["--config", str(recipe), "--out", str(run), "--pretrained-checkpoint", str(start)]) == 0
    phases = json.loads((run / "run.json").read_text())["complete"].values()
    read = [read_architecture(run / "checkpoints" / done["folder"]).cross_attention for done in phases]
    assert read == [phase["cross_attention"] for phase in PHASES]
    exported = to_hf(run, folder / "hf", "--verify")
    assert exported.returncode == 0 and "verified" in exported.stdout, exported.stderr
    return _generate(folder / "hf")


def _generate(folder: Path) -> int:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    prompt = tokenizer("def index(self, key): return self", return_tensors="pt").input_ids
    out = model.generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    return out.shape[1] - prompt.shape[1]


def _worker(results, *args) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        results.put((_walk(*args), None))
    except BaseException:
        results.put((None, traceback.format_exc()))


def walk(folder: Path, family: str, groups: int, tied: bool) -> int:
    """`_walk` in a process of its own; fails with that process's traceback."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    results = context.Queue()
    worker = context.Process(target=_worker, args=(results, folder, family, groups, tied))
    worker.start()
    value, error = results.get(timeout=240)
    worker.join(10)
    assert error is None, error
    return value
