"""Damaged, foreign or hostile checkpoints, full disks, kills: one line, nothing run, nothing half made."""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoints import ENVIRONMENT, ROOT, error_line, make
from tools_here import to_hf
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_clsa.convert.checkpoint import TorchDistReader
from megatron_clsa.convert.export import whole_folder
from megatron_clsa.errors import UserError


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return make(tmp_path_factory.mktemp("sound") / "checkpoint")


@pytest.fixture
def checkpoint(sound, tmp_path):
    """A copy to damage."""
    copy = tmp_path / "checkpoint"
    copy.mkdir()
    for file in sound.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def _refused(checkpoint: Path, *words: str) -> str:
    before = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    out = checkpoint.parent / "hf"
    line = error_line(to_hf(checkpoint, out, *words))
    assert not out.exists() and not list(checkpoint.parent.glob(".hf*"))
    assert before == {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    return line


def _largest(checkpoint: Path) -> Path:
    return max(checkpoint.glob("*.distcp"), key=lambda file: file.stat().st_size)


def test_a_truncated_shard_is_named(checkpoint):
    shard = _largest(checkpoint)
    shard.write_bytes(shard.read_bytes()[:-5000])
    assert shard.name in _refused(checkpoint)


def test_a_flipped_bit_is_found_and_its_file_named(checkpoint):
    shard = _largest(checkpoint)
    data = bytearray(shard.read_bytes())
    place = data.find(b"data/0", len(data) // 2) + 200  # inside a tensor's bytes
    data[place] ^= 1
    shard.write_bytes(data)
    assert shard.name in _refused(checkpoint)


def test_a_missing_shard_is_named(checkpoint):
    shard = _largest(checkpoint)
    moved = checkpoint.parent / "moved"
    shard.rename(moved)
    assert shard.name in _refused(checkpoint)


def test_a_damaged_index_is_named(checkpoint):
    index = checkpoint / ".metadata"
    index.write_bytes(index.read_bytes()[:100])
    assert ".metadata" in _refused(checkpoint)


class _Planted:
    """A pickle that leaves a mark when it is executed."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


def test_a_pickle_planted_in_the_index_never_runs(checkpoint):
    mark = checkpoint.parent / "executed"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(_Planted(mark)))
    assert "asks for" in _refused(checkpoint)
    assert not mark.exists()


def test_a_pickle_planted_in_a_slice_never_runs(checkpoint):
    """A slice is replaced by one whose data.pkl would make a folder; its length and checksums are right."""
    mark = checkpoint.parent / "executed"
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(_Planted(mark)))
        archive.writestr("archive/version", "3\n")
    place = TorchDistReader(checkpoint)._slices[MetadataIndex("memory.norm.weight", torch.Size([0]))]
    room = place.length - len(data.getvalue())
    assert 0 <= room <= 65535  # of the zip's comment
    with (checkpoint / place.relative_path).open("r+b") as file:
        file.seek(place.offset)
        file.write(data.getvalue()[:-2] + room.to_bytes(2, "little") + b" " * room)
    assert place.relative_path in _refused(checkpoint)
    assert not mark.exists()


def test_a_checkpoint_of_something_else_is_refused(checkpoint):
    (checkpoint / "clsa.json").unlink()
    assert "clsa.json" in _refused(checkpoint)


def test_a_clsa_json_of_another_model_is_refused(checkpoint):
    path = checkpoint / "clsa.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ffn_hidden_size": 64}))
    assert "linear_fc1" in _refused(checkpoint)


def test_an_empty_folder_is_no_checkpoint(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no checkpoint" in _refused(empty)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(checkpoint):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(100)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    folder = checkpoint.parent / "tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    line = _refused(checkpoint, "--tokenizer", str(folder))
    assert "100 tokens" in line and "61" in line


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    def full():
        with whole_folder(tmp_path / "hf", force=False) as folder:
            (folder / "config.json").write_text("{}")
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="is full"):
        full()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("written", [0, 3, 10])
def test_kill_9_leaves_no_folder_that_loads(checkpoint, tmp_path, written):
    """Killed when that many shards lie in its temporary folder."""
    out = tmp_path / "hf"
    words = [sys.executable, str(ROOT / "tools" / "to_hf.py"), str(checkpoint), str(out)]
    words += ["--max-shard-size", "1KB"]
    running = subprocess.Popen(words, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    while running.poll() is None and len(list(tmp_path.glob(".hf.*.partial/*.safetensors"))) < written:
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert not out.exists()
