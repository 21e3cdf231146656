"""lm-evaluation-harness on an exported folder, by the documented command, scores what the model scores.

Needs lm-eval; its task and data are the repository's own, so no network.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from eval_folder import write_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
HAVE_LM_EVAL = importlib.util.find_spec("lm_eval") is not None
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def out(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("out")
    words = ["--model", "hf", "--model_args", f"pretrained={folder},trust_remote_code=True,dtype=float32"]
    words += ["--tasks", "local_choice,local_text", "--include_path", "examples/lm_eval", "--batch_size", "4"]
    words += ["--device", "cpu", "--output_path", path, "--log_samples"]
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", *map(str, words)],
        cwd=ROOT, env=os.environ | OFFLINE, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return path


def samples(out: Path, task: str) -> list[dict]:
    (file,) = out.rglob(f"samples_{task}_*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@torch.no_grad()
def log_likelihood(model, tokenizer, question: str, choice: str) -> float:
    start, whole = (tokenizer(text, return_tensors="pt").input_ids for text in (question, question + choice))
    logits = model(whole[:, :-1]).logits.log_softmax(-1)[0, start.shape[1] - 1 :]
    return logits.gather(-1, whole[0, start.shape[1] :, None]).sum().item()


@pytest.mark.slow
@pytest.mark.skipif(not HAVE_LM_EVAL, reason="needs lm-eval (pip install lm-eval)")
def test_the_documented_command_scores_what_the_model_scores(folder, out):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = samples(out, "local_choice")
    assert len(found) == 6 and len(samples(out, "local_text")) == 6
    for sample in found:
        question, choices = sample["doc"]["question"], sample["doc"]["choices"]
        scored = [float(response[0][0]) for response in sample["resps"]]
        expected = [log_likelihood(model, tokenizer, question, f" {choice}") for choice in choices]
        assert scored == pytest.approx(expected, abs=1e-3)
