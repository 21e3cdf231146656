"""What the job scripts decide on their own, with stand-ins for Slurm's commands: no cluster is needed."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def slurm(tmp_path):
    """Runs bash with a `srun` that writes down its words and does what `ranks` says; a site.env of `text`."""
    (tmp_path / "run").mkdir()
    (tmp_path / "bin").mkdir()

    def stand_in(name: str, body: str) -> None:
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    stand_in("scontrol", 'if [ "$1" = -o ]; then echo JobState=RUNNING; else exit 1; fi')

    def run(*words: str, text: str = "", ranks: str = ":", **others: str) -> subprocess.CompletedProcess:
        looks = "case $* in */check_node.py*) exec echo node n1 alike ;; esac"
        stand_in("srun", f'printf "%s\\n" "$*" >{tmp_path}/srun\n{looks}\n{ranks}')
        (tmp_path / "site.env").write_text(f"CLSA_RUNS={tmp_path}/runs\nCLSA_PYTHON=/bin/true\n{text}\n")
        environment = {
            "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "CLSA_ROOT": str(ROOT),
            "CLSA_ENV": str(tmp_path / "site.env"),
        }
        return subprocess.run(
            ["bash", *words], env=environment | others, capture_output=True, text=True, timeout=60
        )

    return run


def _settings(slurm, *more: str, **others) -> subprocess.CompletedProcess:
    return slurm("-c", "\n".join([f"source {ROOT}/slurm/lib.sh", "clsa_settings x", *more]), **others)


def _train(slurm, ranks: str, *flags: str, **others) -> subprocess.CompletedProcess:
    """A start on one node, whose `srun` of the ranks is the bash in `ranks`."""
    job = {"SLURM_NNODES": "1", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n1", "MASTER_ADDR": "n1"}
    return _settings(slurm, " ".join(["clsa_train x", *flags]), ranks=ranks, **job | others)


@pytest.mark.parametrize("line", ["CLSA_MAX_RESTARTS=08", "CLSA_RUNS2=/elsewhere", "CLSA_Data=/data"])
def test_a_setting_that_would_be_misread_is_refused(slurm, line):
    result = _settings(slurm, text=line)
    assert result.returncode == 2 and line.split("=")[0] in result.stderr, result.stderr


def test_an_array_is_refused(slurm):
    """`scontrol requeue` of an array's first number means all of its tasks."""
    result = _settings(slurm, "clsa_train x", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="1")
    assert result.returncode == 2 and "--array" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_refused_requeue_names_the_way_around(slurm):
    result = _settings(slurm, "clsa_again 75")
    assert result.returncode == 75 and "slurm/chain.sh" in result.stdout, result.stdout + result.stderr


def test_a_step_that_left_no_log_is_no_noise(slurm):
    result = _settings(slurm, "clsa_said")
    assert not result.stderr and result.stdout.startswith("see ")


@pytest.mark.parametrize("name, code", [("7/0", 2), ("7/0/nodes.txt", 2), ("restarts", 9)])
def test_a_log_that_cannot_be_written_ends_the_job(slurm, tmp_path, name, code):
    """Nodes are not blamed for it. Something is in the way, as permissions do not hold root."""
    path = tmp_path / "runs/x/logs" / name
    path.parent.mkdir(parents=True)
    path.mkdir() if name != "7/0" else path.write_text("")
    result = _train(slurm, "exit 9")
    told = result.stdout + result.stderr
    assert result.returncode == code and f"{path} cannot be" in told.splitlines()[-1], told
    assert "nodes answer" not in told and "requeue" not in told


@pytest.fixture
def full_disk(slurm, tmp_path):
    """The folder of a run whose job has been started again once, with no byte left."""
    folder = tmp_path / "runs/x"
    folder.mkdir(parents=True)
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True)
    if mount.returncode:
        pytest.skip("cannot mount a small file system: needs root")
    _settings(slurm, "clsa_again 9")
    subprocess.run(["dd", "if=/dev/zero", f"of={folder}/zeros"], capture_output=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_ends_the_job_and_keeps_its_count(slurm, full_disk):
    """An emptied count would begin at 1 again at each start, and the job would be run again for ever."""
    result = _settings(slurm, "clsa_again 9")
    assert result.returncode == 9 and "restarts cannot be written" in result.stdout, result.stdout
    assert (full_disk / "logs/restarts").read_text() == "7\t1\t\n"
    result = _train(slurm, "exit 9")
    assert result.returncode == 2 and "nodes.txt cannot be written" in result.stderr, result.stderr


LONE = "error: rank 1 on n2: /local/model has no clsa.json"
CANCELLED = "slurmstepd-n1: error: *** STEP 7.1 ON n1 CANCELLED AT 2026-01-01T00:00:00 ***"


def _ranks(code: int, srun: str, logs: dict[str, str]) -> str:
    """Ranks that leave these logs, by host, and an srun that says how they ended."""
    files = "".join(f"cat >>${{file/\\%N/{host}}} <<'END'\n{text}\nEND\n" for host, text in logs.items())
    return f"file=$(grep -o '/[^ ]*%N.log' <<<\"$*\")\n{files}cat >&2 <<'END'\n{srun}\nEND\nexit {code}"


def test_what_one_rank_refuses_ends_the_job_with_its_line(slurm):
    """The others wait for it until srun ends them: 137 is the highest code, and Slurm's words come last."""
    srun = "srun: error: n2: task 1: Exited with exit code 2\nsrun: error: n1: task 0: Killed"
    left = f"0: RuntimeError: Connection closed by peer\n0: {CANCELLED}"
    for logs in ({"n1": f"0: {CANCELLED}", "n2": f"1: {LONE}"}, {"n2": f"1: {LONE}", "n3": left}):
        result = _train(slurm, _ranks(137, srun, logs))
        assert result.returncode == 2 and result.stderr == f"{LONE}\n", result.stdout + result.stderr


def test_a_start_is_not_judged_by_what_an_earlier_one_said(slurm):
    """A job that is requeued by hand, after its file is put right."""
    _train(slurm, _ranks(2, "srun: error: n2: task 1: Exited with exit code 2", {"n2": f"1: {LONE}"}))
    crash = _ranks(139, "srun: error: n1: task 0: Segmentation fault", {"n1": "0: step 1"})
    result = _train(slurm, crash, SLURM_RESTART_COUNT="1")
    assert result.returncode == 139 and "clsa.json" not in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize(
    "given, told",
    [
        ({}, "unset none 1"),
        ({"SLURM_CPUS_PER_TASK": "8"}, "8 unset 8"),
        ({"SLURM_CPU_BIND": "cores", "OMP_NUM_THREADS": "4"}, "unset cores 4"),
    ],
    ids=["whole node", "--cpus-per-task", "the site's own"],
)
def test_ranks_are_pinned_to_a_core_only_where_the_job_asks_for_it(slurm, given, told):
    """`srun --cpus-per-task=1` binds each rank to one core; without it the node's are all open."""
    names = ("SRUN_CPUS_PER_TASK", "SLURM_CPU_BIND", "OMP_NUM_THREADS")
    result = _train(slurm, "echo srun sees " + " ".join(f"${{{name}-unset}}" for name in names), **given)
    assert result.returncode == 0 and f"srun sees {told}\n" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize("flags, verified", [((), True), (("--dtype", "bfloat16"), False)])
def test_a_conversion_is_verified_where_it_can_be(slurm, tmp_path, flags, verified):
    """Logits are compared in fp32; another --dtype would always be refused beside --verify."""
    script = str(ROOT / "slurm/convert_to_hf.sh")
    result = slurm(script, str(tmp_path / "run"), str(tmp_path / "hf"), *flags)
    assert result.returncode == 0, result.stderr
    assert ("--verify" in (tmp_path / "srun").read_text()) == verified


def _mounts(tmp_path: Path) -> list[str]:
    found = re.search(r"--container-mounts=(\S+)", (tmp_path / "srun").read_text())
    return found[1].split(",")


@pytest.fixture
def inputs(tmp_path) -> Path:
    """Folders outside the checkout and the run, with a tokenizer in one."""
    for name in ("code", "books", "words", "weights"):
        (tmp_path / "in" / name).mkdir(parents=True)
    (tmp_path / "in/words/model").write_text("")
    return tmp_path / "in"


def test_a_container_sees_the_folders_of_what_the_job_reads(slurm, tmp_path, inputs):
    data = f"0.7 {inputs}/code/a 0.2 {inputs}/books/b 0.1 /none/c"
    text = f"CLSA_CONTAINER=x\nCLSA_DATA='{data}'\nCLSA_TOKENIZER={inputs}/words/model\n"
    result = _train(slurm, ":", f"--pretrained-checkpoint={inputs}/weights", "--lr 0.1", text=text)
    assert result.returncode == 0, result.stderr
    read = [str(inputs / name) for name in ("books", "code", "weights", "words")]
    assert _mounts(tmp_path) == sorted([str(ROOT), f"{tmp_path}/runs/x", *read])
    _train(slurm, ":", text=text + "CLSA_MOUNTS=/shared\n")
    assert _mounts(tmp_path) == ["/shared"]


def test_a_container_sees_where_a_conversion_is_written(slurm, tmp_path):
    (tmp_path / "models").mkdir()
    script, run = str(ROOT / "slurm/convert_to_hf.sh"), str(tmp_path / "run")
    assert slurm(script, run, f"{tmp_path}/models/hf", text="CLSA_CONTAINER=x").returncode == 0
    assert _mounts(tmp_path) == sorted([str(ROOT), run, f"{tmp_path}/models"])
