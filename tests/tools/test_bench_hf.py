"""The benchmarks of the Hugging Face model: the early exit's equal logits and speed, refusals of both."""

import json
import runpy
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def _run(monkeypatch, capsys, tool: str, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", [tool, *words])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(TOOLS / tool), run_name="__main__")
    return left.value.code or 0, *capsys.readouterr()


def test_the_early_exit_gives_the_last_rows_logits(monkeypatch, capsys):
    words = ("--tokens", "700", "--layers", "4", "--hidden", "64", "--vocabulary", "97", "--repeats", "1")
    code, out, _ = _run(monkeypatch, capsys, "bench_hf_prefill.py", *words)
    figures = json.loads(out)
    assert code == 0 and figures["same_argmax"] and figures["logits_gap"] < 1e-4


@pytest.mark.slow
def test_the_early_exit_is_1_8_times_faster_at_8k(monkeypatch, capsys):
    words = ("--tokens", "8192", "--repeats", "1", "--at-least", "1.8")
    code, out, _ = _run(monkeypatch, capsys, "bench_hf_prefill.py", *words)
    assert code == 0, out


@pytest.mark.parametrize(
    "tool, words, said",
    [
        ("bench_hf_prefill.py", ["--tokens", "0"], "--tokens 0"),
        ("bench_hf_prefill.py", ["--model", "nowhere"], "--model nowhere"),
        ("bench_hf_kernels.py", ["--tokens", "2048"], "--tokens"),
    ],
)
def test_refusals_are_one_line_and_exit_2(monkeypatch, capsys, tool, words, said):
    code, _, err = _run(monkeypatch, capsys, tool, *words)
    assert code == 2 and err.startswith("error: ") and said in err and err.count("\n") == 1
