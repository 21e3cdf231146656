"""A Megatron checkpoint gives the report of the folder exported from it."""

import errno
import json
import sys
from pathlib import Path

import pytest
from eval_folder import some_text
from test_evaluate_tool import run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(TESTS / "convert"), str(TESTS / "parallel")]
from checkpoints import make  # noqa: E402
from layouts import VOCAB  # noqa: E402
from tools_here import to_hf  # noqa: E402

FLAGS = ["--tasks", "perplexity,index", "--length", "30", "--sequences", "2", "--rows", "4"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One id a letter of the text."""
    letters = [*sorted(set(some_text())), "Ġ"]
    assert len(letters) < VOCAB - 4
    tokenizer = Tokenizer(models.BPE({"<end>": 0} | {x: i for i, x in enumerate(letters, 1)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    path = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make(tmp_path_factory.mktemp("made") / "checkpoint")


def test_a_checkpoint_is_evaluated_as_its_export_is(monkeypatch, checkpoint, tokenizer, text, tmp_path):
    assert to_hf(checkpoint, tmp_path / "hf", "--tokenizer", tokenizer).returncode == 0
    reports = []
    for model in (checkpoint, tmp_path / "hf"):
        given = ["--model", model, "--tokenizer", tokenizer, "--text", text]
        assert run(monkeypatch, *given, "--out", tmp_path / "out", *FLAGS) == 0
        reports.append(json.loads((tmp_path / "out" / "evaluation.json").read_text()) | {"model": ""})
    assert reports[0] == reports[1]


def _no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def _no_place(**_):
    raise FileNotFoundError("No usable temporary directory found")


@pytest.mark.parametrize(
    "name, fault, said",
    [
        ("megatron_clsa.evaluate.checkpoint.export", _no_space, "is full: nothing was written"),
        ("tempfile.TemporaryDirectory", _no_place, "give another in TMPDIR"),
    ],
)
def test_a_temporary_folder_that_cannot_be_filled(
    monkeypatch, checkpoint, tokenizer, text, tmp_path, capsys, name, fault, said
):
    monkeypatch.setattr(name, fault)
    given = ["--model", checkpoint, "--tokenizer", tokenizer, "--text", text, "--out", tmp_path / "out"]
    assert run(monkeypatch, *given, *FLAGS) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1] and not (tmp_path / "out").exists()


def test_a_checkpoint_without_its_tokenizer_asks_for_one(monkeypatch, checkpoint, text, tmp_path, capsys):
    assert run(monkeypatch, "--model", checkpoint, "--text", text, "--out", tmp_path / "out", *FLAGS) == 2
    assert "give --tokenizer" in capsys.readouterr().err.strip().splitlines()[-1]
