"""tools/evaluate.py writes its report and picture, and refuses bad input in one line with exit code 2."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from eval_folder import byte_tokenizer, seal_and_flip_a_bit, tiny_clsa, write_folder
from transformers import LlamaConfig, LlamaForCausalLM

TOOL = Path(__file__).parents[2] / "tools" / "evaluate.py"
FLAGS = ["--length", "200", "--sequences", "2", "--rows", "5", "--lengths", "700,900", "--samples", "2"]


def run(monkeypatch, *words) -> int:
    spec = importlib.util.spec_from_file_location("evaluate_tool", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
    return tool.main()


def test_report_and_picture(monkeypatch, folder, text, tmp_path, capsys):
    assert run(monkeypatch, "--model", folder, "--text", text, "--out", tmp_path, *FLAGS) == 0
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert {"perplexity", "needle", "index"} <= set(report)
    assert len(report["needle"]) == 10 and {row["length"] for row in report["needle"]} == {700, 900}
    assert [row["layer"] for row in report["index"]["by_layer"]] == [2, 3]
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert "coverage" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["evaluation.json", "evaluation.png"])
def test_a_report_that_cannot_be_written_is_printed_all_the_same(
    monkeypatch, folder, text, tmp_path, capsys, name
):
    (tmp_path / name).mkdir()
    words = ["--model", folder, "--text", text, "--out", tmp_path, *FLAGS, "--tasks", "perplexity"]
    assert run(monkeypatch, *words) == 2
    out, error = capsys.readouterr()
    assert "perplexity" in out and f"--out {tmp_path} cannot be written" in error


def test_the_same_seed_gives_the_same_report(monkeypatch, folder, text, tmp_path):
    reports = []
    for name in "ab":
        run(monkeypatch, "--model", folder, "--text", text, "--out", tmp_path / name, *FLAGS)
        reports.append((tmp_path / name / "evaluation.json").read_text())
    assert reports[0] == reports[1]


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory):
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    return write_folder(tmp_path_factory.mktemp("dense"), LlamaForCausalLM(config))


def test_a_dense_model_is_evaluated_but_for_the_index(monkeypatch, dense_folder, text, tmp_path, capsys):
    words = ["--model", dense_folder, "--text", text, "--out", tmp_path, *FLAGS]
    assert run(monkeypatch, *words, "--tasks", "perplexity,needle", "--needle-tasks", "single") == 0
    assert len(json.loads((tmp_path / "evaluation.json").read_text())["needle"]) == 2
    assert run(monkeypatch, *words) == 2
    assert "llama has none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--tasks", "perplexity,speed"], "--tasks speed"),
        (["--needle-tasks", "double"], "--needle-tasks double"),
        (["--lengths", "1k"], "--lengths 1k"),
        (["--lengths", "100"], "--lengths 100 is too short"),
        (["--length", "12"], "index_topk 12"),
        (["--length", "2000"], "max_position_embeddings 1024"),
        (["--samples", "0"], "--samples 0"),
        (["--text", "nowhere.txt"], "--text nowhere.txt"),
        (["--model", "nowhere"], "--model nowhere"),
        (["--device", "cuda:9"], "--device cuda:9"),
        (["--device", "toaster"], "--device toaster"),
        (["--needle-tasks", ","], "--needle-tasks is empty"),
        (["--speed", "1"], "--speed"),
    ],
)
def test_bad_flag_is_refused_in_one_line(monkeypatch, folder, text, tmp_path, capsys, words, named):
    given = ["--model", folder, "--text", text, "--out", tmp_path / "out", *FLAGS, *words]
    assert run(monkeypatch, *given) == 2
    refusal = capsys.readouterr().err.strip().splitlines()[-1]
    assert refusal.startswith("error: ") and named in refusal
    assert not (tmp_path / "out").exists()


def test_half_a_character_in_a_text_is_named_by_its_line(monkeypatch, folder, tmp_path, capsys):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "a"}\n' + r'{"text": "ab\ud800"}' + "\n")
    assert run(monkeypatch, "--model", folder, "--text", path, "--out", tmp_path / "out", *FLAGS) == 2
    refusal = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"--text {path}:2: character 3" in refusal and not (tmp_path / "out").exists()


def break_config(folder: Path):
    (folder / "config.json").write_text("{")


def lose_a_weight(folder: Path):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.memory.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut_weights(folder: Path):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def flip_a_bit_of_an_export(folder: Path):
    seal_and_flip_a_bit(folder / "model.safetensors")


def lose_the_tokenizer(folder: Path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def swap_the_tokenizer(folder: Path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<extra{i}>" for i in range(50)])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (break_config, "config.json"),
        (lose_a_weight, "model.memory.norm.weight"),
        (cut_weights, "cannot be loaded"),
        (flip_a_bit_of_an_export, "its SHA-256 differs"),
        (lose_the_tokenizer, "cannot be loaded"),
        (swap_the_tokenizer, "307 ids"),
    ],
)
def test_damaged_folder_is_refused_in_one_line(monkeypatch, text, tmp_path, capsys, damage, named):
    folder = write_folder(tmp_path / "model", tiny_clsa(seed=1))
    damage(folder)
    assert run(monkeypatch, "--model", folder, "--text", text, "--out", tmp_path / "out", *FLAGS) == 2
    refusal = capsys.readouterr().err.strip().splitlines()[-1]
    assert refusal.startswith("error: ") and named in refusal, refusal
