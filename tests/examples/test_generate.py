"""`examples/generate.py` on a tiny exported folder: text in, longer text out, and what it refuses.

Owns no claim about tokens: tests/hf holds generation to the model.
"""

import io
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_clsa.hf import CLSAConfig, CLSAForCausalLM

sys.path.append(str(Path(__file__).parents[1] / "evaluate"))
from eval_folder import seal_and_flip_a_bit

SCRIPT = str(Path(__file__).parents[2] / "examples" / "generate.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model with random weights and a tokenizer of bytes."""
    path = tmp_path_factory.mktemp("model")
    alphabet = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(path)
    torch.manual_seed(0)
    config = CLSAConfig(
        vocab_size=len(alphabet),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_self_decoder_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=4,
        index_topk=4,
        index_head_dim=8,
        eos_token_id=0,
    )
    CLSAForCausalLM(config).save_pretrained(path)
    return path


def generate(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, words)])
    return runpy.run_path(SCRIPT)["main"]()


def test_a_prompt_is_continued_and_a_seed_repeats(folder, tmp_path, monkeypatch, capsys):
    file = tmp_path / "prompt.txt"
    file.write_text("def read(")
    said = []
    for prompt in (["--prompt", "def read("], ["--prompt-file", file]):
        words = [folder, *prompt, "--max-new-tokens", 12, "--device", "cpu", "--seed", 3]
        assert generate(monkeypatch, *words) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert said[0].startswith("def read(") and len(said[0].strip()) > len("def read(")


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "--prompt"),
        (["--prompt", ""], "prompt is empty"),
        (["--prompt", "a", "--max-new-tokens", 0], "--max-new-tokens 0"),
        (["--prompt", "a", "--temperature", -1], "--temperature -1"),
        (["--prompt", "a", "--top-p", 2], "--top-p 2"),
        (["--prompt", "a", "--device", "cuda:99"], "--device cuda:99"),
        (["--prompt", "a", "--device", "toaster"], "--device toaster"),
        (["--prompt", "a", "--device", "meta"], "--device meta"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature nan"),
        (["--prompt", "a", "--seed", 10**30], "--seed 1"),
        (["--prompt", "a", "--beam", 2], "--beam"),
        (["--prompt-file", "none.txt"], "--prompt-file none.txt"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(folder, monkeypatch, capsys, words, said):
    assert generate(monkeypatch, folder, *words) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error:") and error.count("\n") == 1


def test_a_prompt_that_is_not_utf_8_is_one_line_and_exit_2(folder, tmp_path, monkeypatch, capsys):
    """A terminal's arguments reach Python with their bad bytes as surrogates."""
    (tmp_path / "prompt.txt").write_bytes(b"a\xff")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff"), errors="surrogateescape"))
    for words in (
        ["--prompt", "a\udcff"],
        ["--prompt-file", "-"],
        ["--prompt-file", tmp_path / "prompt.txt"],
    ):
        assert generate(monkeypatch, folder, *words, "--device", "cpu") == 2
        error = capsys.readouterr().err
        assert f"{words[0]}" in error and "not UTF-8 text (byte 1)" in error and error.count("\n") == 1


def test_standard_input_is_a_prompt_too(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfdef read(")))
    words = ["--prompt-file", "-", "--max-new-tokens", 2, "--device", "cpu"]
    assert generate(monkeypatch, folder, *words) == 0
    assert capsys.readouterr().out.startswith("def read(")


def test_a_folder_without_a_model_is_refused(tmp_path, monkeypatch, capsys):
    assert generate(monkeypatch, tmp_path, "--prompt", "a") == 2
    assert "tools/to_hf.py" in capsys.readouterr().err


def cut(file: Path):
    file.write_bytes(file.read_bytes()[:-100])


def lose_a_weight(file: Path):
    weights = load_file(file)
    del weights["model.norm.weight"]
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name, damage, said",
    [
        ("model.safetensors", cut, "cannot be loaded"),
        ("model.safetensors", seal_and_flip_a_bit, "its SHA-256 differs"),
        ("model.safetensors", lose_a_weight, "lacks weights, 1 of them, such as model.norm.weight"),
        ("tokenizer.json", cut, "cannot be loaded"),
        ("tokenizer.json", Path.unlink, "cannot be loaded"),
        ("config.json", cut, "cannot be loaded"),
    ],
)
def test_a_damaged_folder_is_one_line_and_exit_2(folder, tmp_path, monkeypatch, capsys, name, damage, said):
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    damage(copy / name)
    assert generate(monkeypatch, copy, "--prompt", "a", "--device", "cpu") == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
