"""examples/finetune_deepspeed.py as a user starts it: the folder it leaves, ZeRO-2 and 3, and refusals.

Two gloo ranks on CPU, started by the script itself or by torchrun.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "evaluate"))
from eval_folder import seal_and_flip_a_bit, write_folder  # noqa: E402

TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
FLAGS = [
    "--max-length=48",
    "--batch-size=2",
    "--accumulate=2",
    "--lr=3e-3",
    "--warmup-steps=0",
    "--log-steps=1",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    chats = [[("user", f"say {i}"), ("assistant", f"{i} it is")] for i in range(20)]
    lines = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def finetune(model, data, out, *words, launcher=()) -> subprocess.CompletedProcess:
    script = [ROOT / "examples" / "finetune_deepspeed.py", "--model", model, "--data", data, "--out", out]
    return subprocess.run(
        [sys.executable, *launcher, *map(str, script), *FLAGS, *map(str, words)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in json.loads((out / "training_log.json").read_text())]


@pytest.fixture(scope="module")
def two_ranks(model, data, tmp_path_factory):
    """A run without DeepSpeed that the others must equal."""
    out = tmp_path_factory.mktemp("plain") / "out"
    run = finetune(model, data, out, "--steps", 4, "--nproc-per-node", 2)
    assert run.returncode == 0, run.stderr[-3000:]
    return out


def test_the_tuned_folder_loads_with_its_own_code_and_generates(two_ranks):
    model = AutoModelForCausalLM.from_pretrained(two_ranks, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(two_ranks, trust_remote_code=True)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "say 3"}], add_generation_prompt=True, return_tensors="pt"
    )
    out = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert out.shape[1] > prompt["input_ids"].shape[1]


def test_training_lowers_the_loss_and_logs_the_indexers(two_ranks):
    log = json.loads((two_ranks / "training_log.json").read_text())
    assert log[-1]["loss"] < log[0]["loss"] and all(line["indexer_loss"] > 0 for line in log)


def test_the_indexer_learns_by_default_and_stays_without_its_loss(two_ranks, model, data, tmp_path):
    run = finetune(model, data, tmp_path / "out", "--steps", 1, "--indexer-loss-coef", 0, "--weight-decay", 1)
    assert run.returncode == 0, run.stderr[-3000:]
    name = "model.memory.indexer.q_proj.weight"
    start, tuned, frozen = (
        load_file(folder / "model.safetensors")[name] for folder in (model, two_ranks, tmp_path / "out")
    )
    assert torch.equal(start, frozen) and not torch.equal(start, tuned)


def zero(stage: int) -> list:
    return ["--deepspeed", ROOT / "examples" / f"ds_zero{stage}.json"]


def assert_equal(ours: Path, theirs: Path) -> None:
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-4)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-4)


def test_zero_2_takes_the_same_steps(two_ranks, model, data, tmp_path):
    out = tmp_path / "out"
    run = finetune(model, data, out, "--steps", 4, *zero(2), "--save-steps", 4, launcher=TORCHRUN)
    assert run.returncode == 0, run.stderr[-3000:]
    assert list(out.glob("checkpoint-4/global_step*/*zero_pp_rank_1*")), "DeepSpeed was idle"
    assert_equal(out, two_ranks)


def test_zero_3_takes_the_same_steps_also_when_resumed(two_ranks, model, data, tmp_path):
    words = ["--steps", 4, *zero(3), "--save-steps", 2, "--nproc-per-node", 2]
    run = finetune(model, data, tmp_path / "out", *words)
    assert run.returncode == 0, run.stderr[-3000:]
    assert list(tmp_path.glob("out/checkpoint-2/global_step*/*zero_pp_rank_1*")), "DeepSpeed was idle"
    assert_equal(tmp_path / "out", two_ranks)
    (tmp_path / "cut").mkdir()
    shutil.move(tmp_path / "out" / "checkpoint-2", tmp_path / "cut")
    (tmp_path / "cut" / "checkpoint-3").mkdir()  # of a save that was cut short
    run = finetune(model, data, tmp_path / "cut", *words, "--resume")
    assert run.returncode == 0, run.stderr[-3000:]
    assert_equal(tmp_path / "cut", two_ranks)


def test_two_ranks_refuse_in_one_line_and_with_its_exit_code(model, tmp_path):
    run = finetune(model, "nowhere", tmp_path / "out", *zero(2), "--nproc-per-node", 2)
    assert run.returncode == 2
    said = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert said == ["error: --data nowhere: No such file or directory"]


def deepspeed(content: str):
    def write(folder: Path) -> list:
        (folder / "bad.json").write_text(content)
        return ["--deepspeed", folder / "bad.json"]

    return write


def cut_save(folder: Path) -> list:
    (folder / "out" / "checkpoint-5").mkdir(parents=True)
    return ["--resume"]


def cut_model(folder: Path) -> list:
    write_folder(folder / "cut")
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return ["--model", folder / "cut"]


def flipped_bit(folder: Path) -> list:
    seal_and_flip_a_bit(write_folder(folder / "flipped") / "model.safetensors")
    return ["--model", folder / "flipped"]


def model_of_a_list(folder: Path) -> list:
    (folder / "config.json").write_text("[]")
    return ["--model", folder]


def model_of_another_kind(folder: Path) -> list:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return ["--model", folder]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (lambda folder: ["--deepspeed", "nowhere.json"], "--deepspeed nowhere.json"),
        (deepspeed("{"), "is not JSON"),
        (deepspeed("[]"), "no stage 1, 2 or 3"),
        (deepspeed("{}"), "no stage 1, 2 or 3"),
        (deepspeed('{"zero_optimization": {"stage": 9}}'), "no stage 1, 2 or 3"),
        (lambda folder: zero(2), "add --nproc-per-node"),
        (lambda folder: ["--max-length", "4096"], "--max-length 4096"),
        (lambda folder: ["--accumulate", "0"], "--accumulate 0"),
        (lambda folder: ["--resume"], "has no complete checkpoint-"),
        (cut_save, "has no complete checkpoint-"),
        (lambda folder: ["--out", folder], "--out"),
        (lambda folder: ["--model", folder], "has no config.json"),
        (lambda folder: ["--data", "nowhere.jsonl"], "--data nowhere.jsonl"),
        (lambda folder: ["--indexer-loss-coef", "-1"], "--indexer-loss-coef -1"),
        (lambda folder: ["--lr", "nan"], "--lr nan"),
        (lambda folder: ["--steps", "0"], "--steps 0"),
        (lambda folder: ["--epochs", "-1"], "--epochs -1"),
        (lambda folder: ["--warmup-steps", "-1"], "--warmup-steps -1"),
        (lambda folder: ["--seed", "-1"], "--seed -1"),
        (lambda folder: ["--speed", "1"], "--speed"),
        (lambda folder: ["--out", folder / "occupied" / "x"], "cannot be written"),
        (cut_model, "cannot be loaded"),
        (flipped_bit, "its SHA-256 differs"),
        (model_of_a_list, "cannot be loaded"),
        (model_of_another_kind, "is a llama model"),
    ],
)
def test_bad_input_is_refused_in_one_line(model, data, tmp_path, capsys, words, named):
    (tmp_path / "occupied").touch()
    spec = importlib.util.spec_from_file_location("finetune", ROOT / "examples" / "finetune_deepspeed.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    given = ["--model", model, "--data", data, "--out", tmp_path / "out", *FLAGS, *words(tmp_path)]
    assert script.main([str(word) for word in given]) == 2
    refusal = capsys.readouterr().err.strip().splitlines()[-1]
    assert refusal.startswith("error: ") and named in refusal, refusal
