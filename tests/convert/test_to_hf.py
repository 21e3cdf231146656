"""Exported folders hold the checkpoint's weights, whatever layout saved them, and `--verify` finds faults."""

import json
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import ROOT, architecture, error_line, make
from layouts import Layout
from megatron.core import dist_checkpointing
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tools_here import to_hf

from megatron_clsa.convert import export as exporting
from megatron_clsa.convert.checkpoint import TorchDistReader
from megatron_clsa.convert.names import entries

sys.path.append(str(ROOT / "tests" / "training"))
from runs import distill


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make(tmp_path_factory.mktemp("one") / "checkpoint")


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("hf") / "out"
    result = to_hf(checkpoint, out, "--verify", "--max-shard-size", "40KB")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "verified: logits differ by at most" in result.stdout
    return out


def test_verify_of_another_dtype_is_refused_before_the_export(tmp_path):
    line = error_line(to_hf(tmp_path / "none", tmp_path / "hf", "--verify", "--dtype", "bfloat16"))
    assert "--dtype bfloat16" in line


def _weights(folder) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def _read_otherwise(folder: str) -> list[str]:
    """Runs on one rank, as megatron-core's loader needs: the tensors on which the two readers differ."""
    expected, reader = dist_checkpointing.load_plain_tensors(folder), TorchDistReader(Path(folder))
    assert reader.shapes().keys() == expected.keys()
    return [name for name, tensor in expected.items() if not torch.equal(reader.read(name), tensor)]


def test_the_reader_returns_what_megatron_core_loads(checkpoint):
    assert run_ranks(1, _read_otherwise, str(checkpoint)) == [[]]


def test_the_table_joins_what_it_splits(checkpoint):
    reader = TorchDistReader(checkpoint)
    for entry in entries(architecture(Layout())):
        tensor = reader.read(entry.megatron)[: entry.shape[0]]
        assert torch.equal(entry.join(entry.split(tensor)), tensor), entry.megatron


@pytest.mark.parametrize(
    "layout", [Layout(tp=2), Layout(pp=2), Layout(tp=2, pp=2), Layout(pp=2, vpp=2)], ids=str
)
def test_every_layout_exports_the_same_bytes(checkpoint, folder, layout, tmp_path):
    saved = make(tmp_path / "checkpoint", layout, weights=checkpoint)
    result = to_hf(saved, tmp_path / "hf")
    assert result.returncode == 0, result.stderr[-3000:]
    expected, actual = _weights(folder), _weights(tmp_path / "hf")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [["--context-parallel-size=2"], ["--pipeline-model-parallel-size=2"]])
def test_a_runs_own_checkpoint_of_two_data_parallel_ranks(layout, tmp_path):
    """With the optimizer's shards in it, which Megatron's distributed optimizer writes."""
    result = distill(tmp_path / "run", *layout, ranks=4)
    assert result.returncode == 0, result.stderr[-3000:]
    result = to_hf(tmp_path / "run", tmp_path / "hf", "--verify")
    assert result.returncode == 0 and "verified" in result.stdout, result.stderr[-3000:]


def test_shards_keep_the_limit_and_the_index_names_them(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    weights = _weights(folder)
    assert len(set(index["weight_map"].values())) > 1 and index["weight_map"].keys() == weights.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
    assert weights["model.embed_tokens.weight"].shape[0] == architecture(Layout()).vocab_size


def _window_off_by_one(config, weights):
    config["sliding_window"] += 1


def _index_sign_flipped(config, weights):
    weights["model.memory.indexer.q_proj.weight"].neg_()


def _one_norm_lost(config, weights):
    weights["model.layers.6.input_layernorm.weight"].fill_(1)


def _key_and_value_swapped(config, weights):
    key, value = "model.memory.k_proj.weight", "model.memory.v_proj.weight"
    weights[key], weights[value] = weights[value], weights[key]


def _one_position_fewer(config, weights):
    config["index_topk"] -= 1


def _whole_memory_read(config, weights):
    config["cross_attention"] = "dense"


@pytest.mark.parametrize(
    "plant, said",
    [
        (_window_off_by_one, "logits differ"),
        (_index_sign_flipped, "index selects other positions"),
        (_one_position_fewer, "index selects other positions"),
        (_whole_memory_read, "logits differ"),
        (_one_norm_lost, "logits differ"),
        (_key_and_value_swapped, "logits differ"),
    ],
)
def test_verify_finds_a_planted_error(checkpoint, plant, said, tmp_path, monkeypatch):
    """The tool with a fault in what it writes: refused, and nothing is published."""
    sound = exporting.export

    def faulty(reader, arch, out, *rest):
        config, weights = sound(reader, arch, out, *rest), _weights(out)
        plant(config, weights)
        save_file(weights, next(out.glob("*.safetensors")), metadata={"format": "pt"})
        return config

    monkeypatch.setattr(exporting, "export", faulty)
    assert said in error_line(to_hf(checkpoint, tmp_path / "hf", "--verify"))
    assert not list(tmp_path.iterdir())


def test_a_near_tie_of_the_index_is_no_error(checkpoint, tmp_path, monkeypatch):
    """Scores that rounding orders differently in the two models: here, all nearly equal."""
    sound = exporting.export

    def nearly_equal(reader, arch, out, *rest):
        config = sound(reader, arch, out, *rest)
        path = next(out.glob("*.safetensors"))
        weights = load_file(path)
        weights["model.memory.indexer.k_proj.weight"].mul_(1 + 1e-5)
        weights["model.memory.indexer.k_proj.weight"][0] += 1e-6
        save_file(weights, path, metadata={"format": "pt"})
        return config

    monkeypatch.setattr(exporting, "export", nearly_equal)
    result = to_hf(checkpoint, tmp_path / "hf", "--verify")
    assert result.returncode == 0 and "verified" in result.stdout


def test_an_existing_folder_is_kept_unless_forced(checkpoint, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "precious").write_text("mine")
    assert "--force" in error_line(to_hf(checkpoint, tmp_path / "hf"))
    assert (tmp_path / "hf" / "precious").read_text() == "mine"
    assert to_hf(checkpoint, tmp_path / "hf", "--force").returncode == 0
    assert not (tmp_path / "hf" / "precious").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
