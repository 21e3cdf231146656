"""Bad input through the command: one line that names flag or file, exit code 2, nothing written.

The checks behind the lines have tests of their own; here a user's command is run. Text that is not JSON and
empty text: tests/data/test_preprocess.py.
"""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from runs import TINY, command, distill, run

import megatron_clsa.training.run as training_run
from megatron_clsa.convert.architecture import Architecture
from megatron_clsa.launch import launch
from megatron_clsa.training.run import main

TOKENIZER = "--tokenizer-type=SentencePieceTokenizer"
ON_REAL_DATA = "recipe without mock_data"  # Megatron has no flag that turns mock data off again


def _the_line(code: int, stdout: str, stderr: str) -> str:
    """The one line of a refusal."""
    lines = stderr.splitlines()
    assert code == 2 and not stdout, stdout + stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), stderr
    return lines[0]


def _refusal(result: subprocess.CompletedProcess) -> str:
    return _the_line(result.returncode, result.stdout, result.stderr)


def _refusal_here(capsys, out: Path, *flags: str, recipe: Path = TINY) -> str:
    """What the command says, without the seconds of a new process."""
    capsys.readouterr()
    words = command(out, *flags, recipe=recipe)
    return _the_line(launch(main, words[1], words[2:]), *capsys.readouterr())


def _recipe(folder: Path, old: str = "", new: str = "") -> Path:
    path = folder / "recipe.yaml"
    path.write_text(TINY.read_text().replace(old, new) if old else TINY.read_text())
    return path


FLAGS = {
    "k over the sequence": (["--index-topk=65"], ["--index-topk 65", "--seq-length 64"]),
    "odd number of layers": (["--num-layers=5"], ["--num-layers 5", "--num-self-decoder-layers"]),
    "misspelt flag": (["--sliding-windw=8"], ["--sliding-windw", "--sliding-window"]),
    "missing tokenizer": ([TOKENIZER, "--tokenizer-model=none.model"], ["--tokenizer-model none.model"]),
    "folder for a file": ([TOKENIZER, "--tokenizer-model=/"], ["--tokenizer-model /"]),
    "missing data": ([ON_REAL_DATA, "--data-path", "nowhere/text"], ["nowhere/text.idx is missing"]),
    "empty data": ([ON_REAL_DATA, "--data-path", "EMPTY"], ["empty.idx", "preprocess the data again"]),
    "no data flag": ([ON_REAL_DATA], ["--data-path"]),
    "NCCL without GPU": (["--distributed-backend=nccl"], ["--distributed-backend nccl", "GPU"]),
    "TE without GPU": (["--transformer-impl=transformer_engine"], ["--transformer-impl", "GPU"]),
    "FP8 without GPU": (["--fp8-format=hybrid"], ["--fp8-format hybrid", "GPU"]),
    "GPU kernel without GPU": (
        ["--sparse-attention-kernel=masked"],
        ["--sparse-attention-kernel masked", "GPU"],
    ),
    "unknown kernel": (["--sparse-attention-kernel=best"], ["--sparse-attention-kernel", "union"]),
    "not a number of ranks": (["--nproc-per-node=two"], ["--nproc-per-node two"]),
    "no phase": (["--phases=,"], ["--phases", "dense, warmup, sparse"]),
    "another model": (["--position-embedding-type=none"], ["--position-embedding-type none", "rope"]),
    "unknown phase": (["--phases=wamup"], ["--phases wamup", "warmup"]),
}


@pytest.mark.parametrize("name", FLAGS)
def test_bad_flag_ends_in_one_line_and_code_2(tmp_path, capsys, name):
    flags, named = FLAGS[name]
    recipe = _recipe(tmp_path, "  mock_data: true\n") if ON_REAL_DATA in flags else TINY
    for suffix in (".bin", ".idx"):
        (tmp_path / f"empty{suffix}").touch()
    words = [str(tmp_path / "empty") if flag == "EMPTY" else flag for flag in flags if flag != ON_REAL_DATA]
    line = _refusal_here(capsys, tmp_path / "run", *words, recipe=recipe)
    assert all(word in line for word in named), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "old, new, named",
    [
        ("sliding_window", "sliding_windw", "unknown key sliding_windw; did you mean sliding_window"),
        ("phases:", "phase:", "needs a list `phases:`"),
        ("evaluation:", "evaluations:", "unknown section evaluations; did you mean evaluation"),
        ("train_iters: 4", "train_iters: four", "--train-iters"),
        ("name: dense", "name: [", "is not YAML"),
    ],
)
def test_bad_recipe_ends_in_one_line_and_code_2(tmp_path, capsys, old, new, named):
    line = _refusal_here(capsys, tmp_path / "run", recipe=_recipe(tmp_path, old, new))
    assert named in line, line
    assert not (tmp_path / "run").exists()


RECORDS = ("[]", '{"complete": {"dense": 5}}', '{"complete": {"dense": {}}}', '{"comp')


@pytest.mark.parametrize("content", RECORDS)
def test_a_record_of_phases_that_is_damaged_is_named(tmp_path, capsys, content):
    (tmp_path / "run.json").write_text(content)
    assert "run.json is damaged" in _refusal_here(capsys, tmp_path)


@pytest.mark.parametrize("place", ["", "metrics.jsonl", "checkpoints"])
def test_something_in_the_way_of_the_run_is_named(tmp_path, place):
    """A file in place of the run or its checkpoints, a folder in place of its metrics."""
    out = tmp_path / "a run"
    if place == "metrics.jsonl":
        (out / place).mkdir(parents=True)
    else:
        (out / place).parent.mkdir(exist_ok=True)
        (out / place).touch()
    result = distill(out)
    said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(said) == 1 and "Traceback" not in result.stderr, result.stderr
    assert f"--out {out}" in said[0] and place in said[0]


ARCHITECTURE = Architecture(
    vocab_size=127,
    hidden_size=32,
    ffn_hidden_size=48,
    num_layers=4,
    num_self_decoder_layers=2,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    sliding_window=8,
    index_topk=16,
    index_head_dim=8,
    index_qk_norm=False,
    qk_layernorm=True,
    cross_qk_norm=False,
    layernorm_epsilon=1e-5,
    rotary_base=10000,
    tie_embeddings=True,
    max_position_embeddings=64,
)


@pytest.mark.parametrize(
    "other, named",
    [
        ({"num_layers": 6}, "its num_layers is 6, this run's is 4"),
        ({"index_head_dim": 16}, "its index_head_dim is 16, this run's is 8"),
        ({"vocab_size": 129}, "its vocab_size is 129, this run's is 127"),
        ({}, "holds no complete checkpoint"),
        (None, "has no clsa.json"),
    ],
)
def test_a_checkpoint_of_another_model_or_of_none_is_refused(tmp_path, capsys, other, named):
    folder = tmp_path / "weights"
    folder.mkdir()
    if other is not None:
        replace(ARCHITECTURE, **other).write(folder)
    line = _refusal_here(capsys, tmp_path / "run", f"--pretrained-checkpoint={folder}")
    assert f"{folder} " in line and named in line, line
    assert not (tmp_path / "run").exists()


def test_ranks_refuse_alike_and_one_of_them_says_so(tmp_path):
    """In processes of their own, where imports could say more. Other layouts: test_recipe_and_flags.py."""
    flags = ["--tensor-model-parallel-size=2", "--num-attention-heads=3", "--num-query-groups=3"]
    assert "--num-attention-heads 3" in _refusal(distill(tmp_path / "run", *flags, ranks=2))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("out", ["file", "file/run"])
def test_a_folder_that_cannot_be_made_is_refused_before_ranks_meet(tmp_path, capsys, monkeypatch, out):
    monkeypatch.setattr(training_run, "launcher_store", lambda: pytest.fail("ranks met"))
    (tmp_path / "file").touch()
    assert f"--out {tmp_path / out}: Not a directory" in _refusal_here(capsys, tmp_path / out)


def test_under_torchrun_the_line_comes_first_and_each_rank_answers_2(tmp_path):
    """torchrun itself answers 1 and adds a report of its own; nothing that a worker does changes that."""
    words = command(tmp_path / "run", "--index-topk=65")
    result = run([words[0], "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *words[1:]])
    lines = result.stderr.splitlines()
    assert result.returncode == 1 and [line for line in lines if line.startswith("error: ")] == lines[:1]
    assert "exitcode  : 2" in result.stderr
