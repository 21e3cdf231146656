"""Places, flags and fields that make no sense: one line, exit code 2, and what is read stays as it is.

Damaged checkpoints are in test_bad_checkpoints.py, damaged folders in test_from_hf.py.
"""

import json
import shutil
from pathlib import Path

import pytest
from checkpoints import error_line, make
from dense_models import byte_tokenizer, dense_model
from tools_here import from_hf, to_hf

from megatron_clsa.convert.progress import Bar
from megatron_clsa.convert.whole_folder import whole_folder
from megatron_clsa.errors import UserError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make(tmp_path_factory.mktemp("run") / "checkpoint")


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("hf") / "out"
    assert to_hf(checkpoint, out).returncode == 0
    return out


def _all(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


PLACES = {
    "the source": (lambda source: source, "which is read"),
    "around the source": (lambda source: source.parent, "which is read"),
    "in the source": (lambda source: source / "hf", "lies in"),
    "the root": (lambda source: Path("/"), "root of the file system"),
    "a file": (lambda source: next(path for path in source.iterdir() if path.is_file()), "lies in"),
    "below a file": (lambda source: Path(__file__) / "hf", "cannot be made"),
    "a name too long": (lambda source: source.parent / ("x" * 300), "cannot be made"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("tool", [to_hf, from_hf], ids=["to_hf", "from_hf"])
def test_a_place_that_cannot_be_made_or_would_change_the_source(checkpoint, folder, tool, place):
    source = checkpoint if tool is to_hf else folder
    before, (where, said) = _all(source.parent), PLACES[place]
    assert said in error_line(tool(source, where(source), "--force"))
    assert _all(source.parent) == before


def test_a_link_is_followed(checkpoint, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").touch()
    (tmp_path / "link").symlink_to("real")
    assert "--force" in error_line(to_hf(checkpoint, tmp_path / "link"))
    assert to_hf(checkpoint, tmp_path / "link", "--force").returncode == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").is_file() and not (tmp_path / "real" / "old").exists()


def test_a_relative_place(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert to_hf(checkpoint, Path("a") / ".." / "hf").returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_folder_that_appeared_meanwhile_is_kept(tmp_path):
    def overtaken():
        with whole_folder(tmp_path / "hf", force=False):
            (tmp_path / "hf").mkdir()
            (tmp_path / "hf" / "theirs").touch()

    with pytest.raises(UserError, match="by another process"):
        overtaken()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["hf", "hf/theirs"]


@pytest.mark.parametrize("size", ["0", "-1", "much", "1.2.3GB", "5XB", ""])
def test_a_shard_size_that_is_none(checkpoint, tmp_path, size):
    line = error_line(to_hf(checkpoint, tmp_path / "hf", f"--max-shard-size={size}"))
    assert "--max-shard-size" in line and "500MB" in line


WRONG = {
    "hidden_size": "64",
    "num_layers": -1,
    "num_query_groups": 0,
    "num_self_decoder_layers": 8,
    "qk_layernorm": "yes",
    "rotary_base": "large",
    "layernorm_epsilon": float("nan"),
    "kv_channels": None,
    "index_topk": 0,
    "cross_attention": "thin",
    "indexer_loss_coef": -1,
    "colour": "red",
}


@pytest.mark.parametrize("field", WRONG)
def test_a_field_of_clsa_json_that_no_model_has(checkpoint, tmp_path, field):
    copy = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    content = json.loads((copy / "clsa.json").read_text())
    (copy / "clsa.json").write_text(json.dumps(content | {field: WRONG[field]}))
    line = error_line(to_hf(copy, tmp_path / "hf"))
    assert "clsa.json" in line and field in line


WRONG_CONFIG = {
    "hidden_size": "64",
    "head_dim": None,
    "num_key_value_heads": 3,
    "tie_word_embeddings": "no",
    "rms_norm_eps": -1,
    "rope_parameters": "default",
    "sliding_window": 0,
    "vocab_size": True,
    "cross_attention": "thin",
    "indexer_loss_coef": float("nan"),
}


@pytest.mark.parametrize("field", WRONG_CONFIG)
def test_a_field_of_config_json_that_no_model_has(folder, tmp_path, field):
    copy = Path(shutil.copytree(folder, tmp_path / "hf"))
    content = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(content | {field: WRONG_CONFIG[field]}))
    line = error_line(from_hf(copy, tmp_path / "start"))
    assert "config.json" in line and field in line


@pytest.mark.parametrize(
    "index", ["", "{}", '{"weight_map": []}', '{"weight_map": {"model.norm.weight": "../other.safetensors"}}']
)
def test_an_index_that_is_none(folder, tmp_path, index):
    copy = Path(shutil.copytree(folder, tmp_path / "hf"))
    (copy / "manifest.json").unlink()
    (copy / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in error_line(from_hf(copy, tmp_path / "start"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    path = tmp_path_factory.mktemp("dense")
    dense_model("llama").save_pretrained(path)
    return byte_tokenizer(path)


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--sliding-window", 0),
        ("--index-topk", -1),
        ("--index-head-dim", 0),
        ("--num-self-decoder-layers", 0),
        ("--num-self-decoder-layers", 4),
        ("--position-span", 0),
        ("--calibration-tokens", 0),
        ("--calibration-length", 0),
        ("--calibration-text", "nowhere"),
        ("--device", "toaster"),
        ("--device", "cuda:99"),
        ("--seed", 10**30),
        ("--tokenizer", Path(__file__).parent),
    ],
)
def test_a_flag_of_the_dense_start_that_makes_no_sense(dense, tmp_path, flag, value):
    assert flag in error_line(from_hf("--init-from", "llama", dense, tmp_path / "start", flag, value))
    assert not list(tmp_path.iterdir())


def test_a_flag_of_the_dense_start_for_a_folder_that_is_none(folder, tmp_path):
    line = error_line(from_hf(folder, tmp_path / "start", "--sliding-window", 4))
    assert "--sliding-window" in line and "--init-from" in line


def test_the_bar_shows_what_is_done_and_says_it_ten_times_in_a_log(capsys):
    bar = Bar("weights", "MB", 10**6)
    for done in range(1, 101):
        bar(done * 10**6, 100 * 10**6)
    lines = capsys.readouterr().err.splitlines()
    assert (
        len(lines) == 11 and "weights [" in lines[5] and " 50 %" in lines[5] and "100 of 100 MB" in lines[-1]
    )
