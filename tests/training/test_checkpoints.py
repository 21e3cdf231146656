"""What a checkpoint survives: kills while it is written, damage on disk, planted code, a full disk.

Each test is a row of the fault table in docs/operations.md.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch.distributed as dist
from runs import ENVIRONMENT, ROOT, command, distill, metrics, run, steps

from megatron_clsa.convert import manifest
from megatron_clsa.convert.checkpoint import TorchDistReader, find_checkpoint
from megatron_clsa.errors import UserError
from megatron_clsa.training.checkpoint import TRACKER, Loader, newest_step

SAVER = Path(__file__).with_name("saver.py")
PHASE = Path("checkpoints") / "01_dense"
FLAGS = ["--phases", "dense", "--train-iters", "6", "--save-interval", "2"]
NOT_COMPARED = {"tokens_per_second", "step_time"}


def _loader(own: Path, store=None, rank: int = 0, ranks: int = 1) -> Loader:
    return Loader(store or dist.HashStore(), rank, ranks, own)


def _flip_a_bit(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


def _reseal(folder: Path) -> None:
    """A manifest that agrees with whatever lies there now, as an attacker would write it."""
    names = manifest.read_manifest(folder)
    manifest.seal(folder, {name: manifest.describe(folder / name) for name in names}, {})


def test_kill_9_at_20_random_instants_of_saves_leaves_the_newest_complete_checkpoint_loadable(tmp_path):
    result = subprocess.run(
        [sys.executable, str(SAVER), str(tmp_path), "20"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    rounds = [line.partition("complete") for line in result.stdout.splitlines() if line.startswith("steps")]
    assert len(rounds) == 20
    cut_short = sum(set(seen.split()[1:]) != set(complete.split()) for seen, _, complete in rounds)
    assert cut_short > 0, "no kill met a save; nothing was tested"
    newest = [max(map(int, complete.split())) for _, _, complete in rounds]
    assert newest == sorted(newest)
    step = _loader(tmp_path.parent).newest(tmp_path)
    assert step == newest[-1]
    reader = TorchDistReader(manifest.step_folder(tmp_path, step))
    assert all((reader.read(name) == step).all() for name in "ab")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    result = distill(out, *FLAGS)
    assert result.returncode == 0, result.stderr[-3000:]
    return out


@pytest.fixture
def phase(whole_run, tmp_path) -> Path:
    """A copy of the run's checkpoints of steps 2, 4 and 6."""
    return shutil.copytree(whole_run / PHASE, tmp_path / PHASE)


def test_a_run_goes_on_from_before_the_damage_and_ends_the_same(whole_run, tmp_path, capfd):
    """Flipped bit, planted pickle with a manifest that agrees, unreadable tracker: in one run."""
    phase = shutil.copytree(whole_run, tmp_path / "run") / PHASE
    (tmp_path / "run" / "run.json").unlink()
    shard = manifest.step_folder(phase, 6) / "__0_0.distcp"
    _flip_a_bit(shard)
    proof = tmp_path / "it_ran"
    index = manifest.step_folder(phase, 4) / ".metadata"
    index.write_bytes(pickle.dumps(_Plant(proof)))
    _reseal(index.parent)
    (phase / TRACKER).write_text("garbage")
    result = distill(tmp_path / "run", *FLAGS)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"step 6 skipped: {shard} was changed" in result.stderr
    assert f"step 4 skipped: {index} is refused" in result.stderr
    assert "names 'garbage'" in result.stderr and "resuming at step 2" in result.stdout
    assert not proof.exists()
    for expected, actual in zip(metrics(whole_run), metrics(tmp_path / "run"), strict=True):
        same = expected.keys() - NOT_COMPARED
        assert {key: actual[key] for key in same} == {key: expected[key] for key in same}
    assert newest_step(phase) == 6 and (phase / "damaged_iter_0000006").is_dir()


class _Plant:
    """Writes a file if it is ever unpickled."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


@pytest.mark.parametrize("at", [0.0, 0.3, 0.6, 0.999])
def test_one_flipped_bit_is_refused_by_the_name_of_its_file(phase, capsys, at):
    shard = manifest.step_folder(phase, 6) / "__0_0.distcp"
    _flip_a_bit(shard, at)
    assert _loader(phase.parent).newest(phase) == 4
    assert f"{shard} was changed after it was written" in capsys.readouterr().err


def _truncate(phase: Path):
    os.truncate(manifest.step_folder(phase, 6) / "__0_0.distcp", 1000)


def _empty(phase: Path):
    os.truncate(manifest.step_folder(phase, 6) / "__0_0.distcp", 0)


def _remove(phase: Path):
    (manifest.step_folder(phase, 6) / "__0_0.distcp").unlink()


def _mix(phase: Path):
    """The shard of another save: its own checksum is right, this checkpoint's is not."""
    shutil.copy(manifest.step_folder(phase, 4) / "__0_0.distcp", manifest.step_folder(phase, 6))


def _cut_manifest(phase: Path):
    os.truncate(manifest.step_folder(phase, 6) / manifest.NAME, 40)


def _no_manifest(phase: Path):
    (manifest.step_folder(phase, 6) / manifest.NAME).unlink()


def _leave_the_folder(phase: Path):
    path = manifest.step_folder(phase, 6) / manifest.NAME
    content = json.loads(path.read_text())
    content["files"]["../../etc/passwd"] = {"bytes": 1, "sha256": "0"}
    path.write_text(json.dumps(content))


DAMAGE = {
    "truncated shard": (_truncate, "has 1000 bytes instead of"),
    "empty shard": (_empty, "has 0 bytes instead of"),
    "missing shard": (_remove, "__0_0.distcp is missing"),
    "shards of two saves": (_mix, "__0_0.distcp"),
    "manifest cut off": (_cut_manifest, "manifest.json is damaged"),
    "no manifest": (_no_manifest, "its save was cut short"),
    "manifest names a file elsewhere": (_leave_the_folder, "it names ../../etc/passwd"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_the_checkpoint_before_is_taken(phase, capsys, name):
    damage, words = DAMAGE[name]
    damage(phase)
    assert _loader(phase.parent).newest(phase) == 4
    said = capsys.readouterr().err
    assert "checkpoint of step 6 skipped" in said and words in said
    assert find_checkpoint(phase).name == "iter_0000004"


@pytest.mark.parametrize("content", ["", "garbage", "99"])
def test_the_tracker_is_only_a_hint(phase, capsys, content):
    (phase / TRACKER).write_text(content)
    assert _loader(phase.parent).newest(phase) == 6
    assert "the newest complete checkpoint is step 6" in capsys.readouterr().err
    assert (phase / TRACKER).read_text() == "6"


def test_checkpoints_that_are_all_damaged_stop_the_run_instead_of_starting_it_over(phase):
    for step in (2, 4, 6):
        _flip_a_bit(manifest.step_folder(phase, step) / "__0_0.distcp")
    with pytest.raises(UserError, match="no checkpoint can be loaded"):
        _loader(phase.parent).newest(phase)


def test_a_phase_whose_first_save_was_cut_short_starts_over(phase):
    for step in (2, 4, 6):
        (manifest.step_folder(phase, step) / manifest.NAME).unlink()
    assert _loader(phase.parent).newest(phase) is None


def test_ranks_that_read_different_files_agree_on_one_checkpoint(phase):
    """Four ranks share four files; only one of them sees the damage."""
    _flip_a_bit(manifest.step_folder(phase, 6) / "metadata.json")
    store, chosen = dist.HashStore(), {}

    def choose(rank: int):
        chosen[rank] = _loader(phase.parent, store, rank, 4).newest(phase)

    ranks = [threading.Thread(target=choose, args=(rank,)) for rank in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert chosen == dict.fromkeys(range(4), 4)


def _complete(phase: Path, step: int) -> None:
    folder = manifest.step_folder(phase, step)
    folder.mkdir(parents=True)
    (folder / "shard").write_text("x")
    manifest.seal(folder, {"shard": manifest.describe(folder / "shard")}, {})


@pytest.mark.parametrize(
    "last, every, kept", [(2, None, [100, 90]), (1, 50, [100, 50]), (3, 20, [100, 90, 80, 60, 40, 20])]
)
def test_the_last_n_and_every_mth_checkpoint_stay(tmp_path, last, every, kept):
    for step in range(10, 101, 10):
        _complete(tmp_path, step)
    manifest.prune(tmp_path, last, every)
    assert manifest.steps_in(tmp_path) == kept


def test_an_unfinished_save_does_not_count_as_one_of_the_last_n(tmp_path):
    for step in (1, 2, 3):
        _complete(tmp_path, step)
    (manifest.step_folder(tmp_path, 3) / manifest.NAME).unlink()
    manifest.prune(tmp_path, 1, None)
    assert manifest.complete_steps(tmp_path) == [2]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 5 MiB; a checkpoint of the tiny model takes 0.9 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", folder], capture_output=True)
    if mount.returncode:
        pytest.skip("cannot mount a small file system: needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


FULL = {
    "seen ahead": ("examples/distill.py", "was not written: it takes"),
    "while writing": ("tests/training/blind_run.py", "could not be written, 0 MiB are free"),
}


@pytest.mark.parametrize("case", FULL)
def test_a_full_disk_ends_the_run_in_one_line_and_keeps_what_is_saved(small_disk, case):
    script, words = FULL[case]
    flags = ["--phases", "dense", "--train-iters", "12", "--save-interval", "1"]
    phase = small_disk / "run" / PHASE
    for step in range(1, 13):  # each save finds what a killed one left in its place
        manifest.step_folder(phase, step).mkdir(parents=True)
        (manifest.step_folder(phase, step) / "__0_0.distcp").write_text("cut short")
    result = run([sys.executable, str(ROOT / script), *command(small_disk / "run", *flags)[2:]])
    said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2, result.stderr[-3000:]
    assert len(said) == 1 and words in said[0]
    assert "Traceback" not in result.stderr
    newest = newest_step(phase)
    assert newest is not None and _loader(phase.parent).newest(phase) == newest
    assert case == "while writing" or f"newest complete checkpoint: step {newest};" in said[0]
    assert len(steps(small_disk / "run")) >= newest


@pytest.mark.slow
def test_a_full_disk_is_no_end_where_old_checkpoints_may_go(small_disk):
    flags = ["--phases", "dense", "--train-iters", "8", "--save-interval", "1", "--keep-last", "2"]
    result = distill(small_disk / "run", *flags)
    assert result.returncode == 0, result.stderr[-3000:]
    assert manifest.complete_steps(small_disk / "run" / PHASE) == [8, 7]


def _release(folder: Path) -> Path:
    """A converted checkpoint, as tools/from_hf.py leaves it."""
    _complete(folder, 1)
    manifest.step_folder(folder, 1).rename(folder / "release")
    (folder / TRACKER).write_text("release\n")
    return folder / "release"


def test_converted_weights_are_checked_too(tmp_path, phase):
    released = _release(tmp_path / "model")
    shutil.copy(manifest.step_folder(phase, 6) / ".metadata", released)
    assert _loader(phase.parent).newest(tmp_path / "model") is None
    _flip_a_bit(released / "shard")
    with pytest.raises(UserError, match="shard was changed after it was written"):
        _loader(phase.parent).newest(tmp_path / "model")


def test_a_foreign_tracker_that_names_nothing_is_refused_instead_of_ending_with_code_0(tmp_path):
    (tmp_path / TRACKER).write_text("")
    with pytest.raises(UserError, match="write the step to load"):
        _loader(tmp_path / "run").newest(tmp_path)
