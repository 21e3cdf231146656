"""On a GPU, what takes an exported folder gives the figures and the text that the CPU gives.

Owns nothing that runs without a device: the kernels' own path is in tests/hf/test_hf_gpu.py.
"""

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "evaluate"))
from eval_folder import some_text, tiny_clsa, write_folder  # noqa: E402

pytestmark = pytest.mark.gpu
EVALUATE = ["--length", "400", "--sequences", "2", "--rows", "8", "--lengths", "700", "--samples", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Head sizes that the kernels serve."""
    model = tiny_clsa(head_dim=32, index_head_dim=32, sliding_window=32, index_topk=64)
    return write_folder(tmp_path_factory.mktemp("model"), model)


@pytest.fixture
def run(monkeypatch, capsys):
    """A script in this process; returns what it printed."""

    def run(script: str, *words) -> str:
        words = [str(word) for word in words]
        monkeypatch.setattr(sys, "argv", [script, *words])
        main = runpy.run_path(str(ROOT / script))["main"]
        assert main(*([words] if main.__wrapped__.__code__.co_argcount else [])) == 0
        return capsys.readouterr().out

    return run


def figures(part) -> list[float]:
    """All numbers of a report, in order."""
    if isinstance(part, (dict, list)):
        return [x for value in (part.values() if isinstance(part, dict) else part) for x in figures(value)]
    return [] if isinstance(part, (str, bool)) else [part]


def test_an_evaluation_is_the_cpus(folder, tmp_path, run):
    text = tmp_path / "held_out.txt"
    text.write_text(some_text())
    reports = []
    for device in ("cpu", "cuda"):
        given = ["--model", folder, "--text", text, "--out", tmp_path / device, "--device", device]
        run("tools/evaluate.py", *given, *EVALUATE)
        reports.append(json.loads((tmp_path / device / "evaluation.json").read_text()))
    assert figures(reports[1]) == pytest.approx(figures(reports[0]), rel=1e-4, abs=1e-3)


def test_a_greedy_text_is_the_cpus(folder, run):
    words = [folder, "--prompt", some_text(300), "--max-new-tokens", 16, "--temperature", 0]
    said = [run("examples/generate.py", *words, "--device", device) for device in ("cpu", "cuda")]
    assert said[0] == said[1] and len(said[0].strip()) > 300


def test_fine_tuning_lowers_the_loss(folder, tmp_path, run):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": some_text(3000)}) + "\n")
    given = ["--model", folder, "--data", data, "--out", tmp_path / "out", "--max-length", 200, "--steps", 8]
    flags = ["--accumulate", 1, "--batch-size", 2, "--lr", 3e-3, "--log-steps", 1, "--gradient-checkpointing"]
    run("examples/finetune_deepspeed.py", *given, *flags)
    log = json.loads((tmp_path / "out" / "training_log.json").read_text())
    assert log[-1]["loss"] < log[0]["loss"] and all(line["indexer_loss"] > 0 for line in log)
