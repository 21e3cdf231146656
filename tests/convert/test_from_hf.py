"""What `tools/from_hf.py` writes loads at every layout and comes back from it to the last bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import error_line, make
from dense_models import byte_tokenizer
from layouts import Layout
from safetensors.torch import load_file, save_file
from tools_here import from_hf, to_hf

from megatron_clsa.convert.architecture import read_architecture
from megatron_clsa.convert.dist_writer import STEP_FOLDER


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return make(tmp_path_factory.mktemp("trained") / "checkpoint")


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("hf") / "out"
    assert to_hf(trained, out).returncode == 0
    return out


@pytest.fixture(scope="module")
def start(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("start") / "checkpoint"
    result = from_hf(folder, out, "--verify")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "verified: logits differ by at most" in result.stdout
    return out


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def _assert_same_model(actual: Path, expected: Path):
    left, right = _weights(actual), _weights(expected)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in right)
    assert (actual / "config.json").read_text() == (expected / "config.json").read_text()


@pytest.mark.parametrize("layout", [None, Layout(), Layout(tp=2), Layout(pp=2), Layout(tp=2, pp=2)], ids=str)
def test_round_trip_through_ranks_of_any_layout_is_bitwise(start, folder, layout, tmp_path):
    """Folder -> checkpoint -> (loaded and saved by the ranks of a layout) -> folder."""
    checkpoint = start
    if layout is not None:
        checkpoint = make(tmp_path / "checkpoint", layout, weights=start / STEP_FOLDER)
    result = to_hf(checkpoint, tmp_path / "hf")
    assert result.returncode == 0, result.stderr[-3000:]
    _assert_same_model(tmp_path / "hf", folder)


def test_the_architecture_comes_back(start, trained):
    assert read_architecture(start) == read_architecture(trained)


def test_bfloat16_weights_stay_bfloat16(folder, trained, tmp_path):
    for words in (
        (to_hf, trained, tmp_path / "half", "--dtype", "bfloat16"),
        (from_hf, tmp_path / "half", tmp_path / "start"),
        (to_hf, tmp_path / "start", tmp_path / "again"),
    ):
        result = words[0](*words[1:])
        assert result.returncode == 0, result.stderr[-3000:]
    assert {t.dtype for t in _weights(tmp_path / "again").values()} == {torch.bfloat16}
    _assert_same_model(tmp_path / "again", tmp_path / "half")


def test_weights_of_several_dtypes_come_back_as_they_were(folder, tmp_path):
    """As folders that keep their norms in fp32."""
    mixed = Path(shutil.copytree(folder, tmp_path / "mixed"))
    (mixed / "manifest.json").unlink()
    weights = {k: v if "norm" in k else v.bfloat16() for k, v in _weights(mixed).items()}
    save_file(weights, _shard(mixed), metadata={"format": "pt"})
    config = json.loads((mixed / "config.json").read_text()) | {"dtype": "bfloat16"}
    (mixed / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    assert from_hf(mixed, tmp_path / "start").returncode == 0
    assert to_hf(tmp_path / "start", tmp_path / "again").returncode == 0
    again = _weights(tmp_path / "again")
    assert {k: v.dtype for k, v in again.items()} == {k: v.dtype for k, v in weights.items()}
    _assert_same_model(tmp_path / "again", mixed)


def test_a_folder_that_reads_the_whole_memory_stays_one(folder, tmp_path):
    """And keeps the weight of the index's loss, which fine-tuning writes."""
    dense = Path(shutil.copytree(folder, tmp_path / "dense"))
    config = json.loads((dense / "config.json").read_text())
    config |= {"cross_attention": "dense", "indexer_loss_coef": 0.25}
    (dense / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for words in ((from_hf, dense, tmp_path / "start"), (to_hf, tmp_path / "start", tmp_path / "again")):
        result = words[0](*words[1:], "--verify")
        assert result.returncode == 0 and "verified" in result.stdout, result.stderr[-3000:]
    _assert_same_model(tmp_path / "again", dense)
    assert len([line for line in result.stderr.splitlines() if line.startswith("WARNING: ")]) == 1
    assert "read the whole memory" in (tmp_path / "again" / "README.md").read_text()


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the folder to damage."""
    path = tmp_path / "copy"
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def _refused(copy: Path, *words: str) -> str:
    out, before = copy.parent / "start", {file.name: file.read_bytes() for file in copy.iterdir()}
    line = error_line(from_hf(copy, out, *words))
    assert not out.exists() and not list(copy.parent.glob(".start*"))
    assert before == {file.name: file.read_bytes() for file in copy.iterdir()}
    return line


def _shard(copy: Path) -> Path:
    return next(copy.glob("*.safetensors"))


def test_a_truncated_file_is_named(copy):
    shard = _shard(copy)
    shard.write_bytes(shard.read_bytes()[:-100])
    assert shard.name in _refused(copy)


@pytest.mark.parametrize("file", ["model-00001-of-00001.safetensors", "model.safetensors.index.json"])
def test_a_flipped_bit_is_found_and_its_file_named(copy, file):
    path = copy / file
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    line = _refused(copy)
    assert file in line and "SHA-256" in line and "manifest.json" in line


def test_a_folder_without_a_manifest_is_read_as_it_is(copy, start, tmp_path):
    (copy / "manifest.json").unlink()
    assert from_hf(copy, tmp_path / "start").returncode == 0
    name = Path(STEP_FOLDER) / "__0_0.distcp"
    assert (tmp_path / "start" / name).read_bytes() == (start / name).read_bytes()


def test_a_file_that_the_export_did_not_write_is_named(copy):
    path = copy / "manifest.json"
    content = json.loads(path.read_text())
    del content["files"][_shard(copy).name]
    path.write_text(json.dumps(content))
    assert f"{_shard(copy).name} was not part of this export" in _refused(copy)


def test_a_damaged_manifest_is_named(copy):
    (copy / "manifest.json").write_text('{"files": {')
    assert "manifest.json is damaged" in _refused(copy)


def test_a_missing_file_is_named(copy):
    shard = _shard(copy)
    shard.unlink()
    assert shard.name in _refused(copy)


def test_a_dense_model_needs_init_from(copy):
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "llama"}))
    assert "model_type is llama" in _refused(copy) and "--init-from" in _refused(copy)


def test_a_rotary_base_that_training_cannot_take(copy):
    """model.yaml would have to round it."""
    path = copy / "config.json"
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.5}}
    path.write_text(json.dumps(json.loads(path.read_text()) | rope))
    assert "rope_theta is 10000.5" in _refused(copy)


def test_a_config_of_another_size_names_the_tensor(copy):
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 62}))
    line = _refused(copy)
    assert "model.embed_tokens.weight" in line and "62" in line


@pytest.mark.parametrize("content", ["", "{"])
def test_a_tokenizer_that_is_none_is_refused(copy, tmp_path, content):
    (tmp_path / "broken.model").write_text(content)
    assert "broken.model" in _refused(copy, "--tokenizer", str(tmp_path / "broken.model"))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(copy, tmp_path):
    line = _refused(copy, "--tokenizer", str(byte_tokenizer(tmp_path / "tokenizer")))
    assert "257 tokens" in line and "vocabulary 61" in line


def test_a_tensor_that_no_clsa_model_has_is_named(copy):
    shard = _shard(copy)
    (copy / "manifest.json").unlink()
    save_file(load_file(shard) | {"model.layers.0.self_attn.rotary": torch.ones(2)}, shard)
    assert "model.layers.0.self_attn.rotary" in _refused(copy)


def test_pickled_weights_are_never_opened(copy):
    shard = _shard(copy)
    torch.save(load_file(shard), copy / "pytorch_model.bin")
    shard.unlink()
    (copy / "model.safetensors.index.json").unlink()
    assert "safetensors" in _refused(copy)
