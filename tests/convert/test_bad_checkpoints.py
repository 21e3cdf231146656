"""Damaged, foreign or hostile checkpoints, full disks, kills: one line, nothing run, nothing half made."""

import io
import json
import os
import pickle
import random
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

from megatron_clsa.convert import manifest
from megatron_clsa.convert.architecture import read_architecture
from megatron_clsa.convert.checkpoint import TorchDistReader
from megatron_clsa.convert.dist_index import load_index, read_index
from megatron_clsa.convert.export import check_tensors
from megatron_clsa.convert.whole_folder import whole_folder
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
    place = read_index(checkpoint / ".metadata")["memory.norm.weight"].slices[0]
    room = place.length - len(data.getvalue())
    assert 0 <= room <= 65535  # of the zip's comment
    with (checkpoint / place.file).open("r+b") as file:
        file.seek(place.offset)
        file.write(data.getvalue()[:-2] + room.to_bytes(2, "little") + b" " * room)
    assert place.file in _refused(checkpoint)
    assert not mark.exists()


def _seal(checkpoint: Path) -> None:
    """The manifest that a training run writes."""
    files = [file.name for file in checkpoint.iterdir() if file.name != "clsa.json"]
    manifest.seal(checkpoint, {name: manifest.describe(checkpoint / name) for name in files}, {})


def test_weights_of_another_run_are_named(checkpoint):
    """Of equal shapes, with sound checksums of their own: only the manifest tells them from this run's."""
    _seal(checkpoint)
    reader, entry = TorchDistReader(checkpoint), "memory.norm.weight"
    place = read_index(checkpoint / ".metadata")[entry].slices[0]
    data = io.BytesIO()
    torch.save(reader.read(entry) + 1, data)
    assert len(data.getvalue()) == place.length
    with (checkpoint / place.file).open("r+b") as file:
        file.seek(place.offset)
        file.write(data.getvalue())
    assert f"{place.file} was changed after it was written" in _refused(checkpoint)


def test_a_file_that_the_manifest_does_not_name_is_refused(checkpoint):
    _seal(checkpoint)
    content = json.loads((checkpoint / "manifest.json").read_text())
    del content["files"][".metadata"]
    (checkpoint / "manifest.json").write_text(json.dumps(content))
    assert ".metadata was not part of this save" in _refused(checkpoint)


def _refused_or_sound(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    """A damage may be seen or change nothing; no other error, no other weight."""
    try:
        reader = TorchDistReader(folder)
        table = check_tensors(reader, read_architecture(folder))
        found = {entry.megatron: reader.read(entry.megatron) for entry in table}
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.fixture(scope="module")
def contents(sound):
    reader = TorchDistReader(sound)
    return {name: reader.read(name) for name in reader.shapes()}


@pytest.mark.parametrize("file", [".metadata", "*.distcp"])
def test_a_flipped_bit_without_a_manifest_is_one_line_wherever_it_is(checkpoint, contents, file):
    path = next(checkpoint.glob(file))
    sound, rng = path.read_bytes(), random.Random(1)
    for _ in range(150):
        data = bytearray(sound)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        _refused_or_sound(checkpoint, contents)


def _without_an_offset(index):
    place = next(place for key, place in index.storage_data.items() if key.fqn == "memory.norm.weight")
    del place.__dict__["offset"]


def _without_chunks(index):
    del index.state_dict_metadata["memory.norm.weight"].__dict__["chunks"]


def _outside(index):
    for place in index.storage_data.values():
        object.__setattr__(place, "relative_path", "../" + place.relative_path)


def _at_one_place(index):
    places = index.storage_data
    norms = [key for key in places if key.fqn in ("memory.norm.weight", "decoder.final_layernorm.weight")]
    places[norms[0]] = places[norms[1]]


def _whole_numbers(index):
    entry = index.state_dict_metadata["memory.norm.weight"]
    entry.properties.dtype = torch.int32


@pytest.mark.parametrize(
    "damage, said",
    [
        (_without_an_offset, "offset"),
        (_without_chunks, "chunks"),
        (_outside, "lies in '../"),
        (_at_one_place, "two slices share byte"),
        (_whole_numbers, "memory.norm.weight is torch.int32"),
    ],
)
def test_an_index_that_no_save_writes_is_refused(checkpoint, damage, said):
    path = checkpoint / ".metadata"
    with path.open("rb") as file:
        index = load_index(file)
    damage(index)
    path.write_bytes(pickle.dumps(index))
    assert said in _refused(checkpoint)


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


def _on_a_small_disk(folder: Path, size: str, tool: str, *words) -> subprocess.CompletedProcess:
    """Run a tool with a file system of `size` at `folder`, which the user's own namespace may mount."""
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(folder)]).returncode:
        pytest.skip("this system lets users mount nothing")
    script = f'mount -t tmpfs -o size={size} none "$0" || exit 1; "$@"; code=$?; ls -A "$0"; exit $code'
    words = ["unshare", "-rm", "sh", "-c", script, folder, sys.executable, ROOT / "tools" / tool, *words]
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, env=ENVIRONMENT)


@pytest.mark.parametrize("size", ["16k", "128k"])
@pytest.mark.parametrize("tool", ["to_hf.py", "from_hf.py"])
def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(checkpoint, tmp_path, tool, size):
    source, disk = checkpoint, tmp_path / "disk"
    disk.mkdir()
    if tool == "from_hf.py":
        source = tmp_path / "hf"
        assert to_hf(checkpoint, source).returncode == 0
    before = {file.name: file.read_bytes() for file in source.iterdir() if file.is_file()}
    result = _on_a_small_disk(disk, size, tool, source, disk / "out")
    assert f"{disk} is full" in error_line(result)
    assert result.stdout == ""  # of ls, too
    assert before == {file.name: file.read_bytes() for file in source.iterdir() if file.is_file()}


def _kill(words: list, out: Path, far_enough) -> None:
    """Run a tool until `far_enough(its temporary folder's files)`, then kill it."""
    words = [sys.executable, *map(str, words)]
    running = subprocess.Popen(words, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    while running.poll() is None and not far_enough(list(out.parent.glob(f".{out.name}.*.partial/**/*"))):
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert not out.exists()


def _has(name: str):
    return lambda files: any(file.name == name for file in files)


def _shards(count: int):
    return lambda files: sum(file.suffix == ".safetensors" for file in files) >= count


@pytest.mark.parametrize(
    "far_enough",
    [_shards(0), _shards(3), _shards(10), _has("manifest.json")],
    ids=["0", "3", "10", "verifying"],
)
def test_kill_9_leaves_no_folder_that_loads(checkpoint, tmp_path, far_enough):
    """Killed when that many shards lie in its temporary folder, or all: it does not load either."""
    from transformers import AutoModelForCausalLM

    words = [ROOT / "tools" / "to_hf.py", checkpoint, tmp_path / "hf", "--max-shard-size", "1KB", "--verify"]
    _kill(words, tmp_path / "hf", far_enough)
    for left in tmp_path.glob(".hf.*"):
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(left, trust_remote_code=True)


def _tensors(size: int):
    return lambda files: sum(file.stat().st_size for file in files if file.suffix == ".distcp") >= size


@pytest.mark.parametrize(
    "far_enough, said",
    [
        (_tensors(0), "holds no checkpoint"),
        (_tensors(1), "holds no checkpoint"),
        (_has("model.yaml"), "has no clsa.json"),
    ],
    ids=["0", "1", "verifying"],
)
def test_kill_9_of_the_way_back_leaves_no_checkpoint(checkpoint, tmp_path, far_enough, said):
    """Killed when that many bytes of tensors lie in its temporary folder, or all."""
    folder, out = tmp_path / "hf", tmp_path / "start"
    assert to_hf(checkpoint, folder).returncode == 0
    _kill([ROOT / "tools" / "from_hf.py", folder, out, "--verify"], out, far_enough)
    for left in tmp_path.glob(".start.*"):
        assert said in error_line(to_hf(left, tmp_path / "again"))
