"""What the job scripts decide on their own, with stand-ins for Slurm's commands: no cluster is needed."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def slurm(tmp_path):
    """Runs bash with `srun` and `scontrol` that write down their words; a site.env of `text`."""
    (tmp_path / "run").mkdir()
    commands = {
        "srun": f'printf "%s\\n" "$*" >{tmp_path}/srun',
        "scontrol": 'if [ "$1" = -o ]; then echo JobState=RUNNING; else exit 1; fi',
    }
    for name, body in commands.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    def run(*words: str, text: str = "", **others: str) -> subprocess.CompletedProcess:
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


@pytest.mark.parametrize("flags, verified", [((), True), (("--dtype", "bfloat16"), False)])
def test_a_conversion_is_verified_where_it_can_be(slurm, tmp_path, flags, verified):
    """Logits are compared in fp32; another --dtype would always be refused beside --verify."""
    script = str(ROOT / "slurm/convert_to_hf.sh")
    result = slurm(script, str(tmp_path / "run"), str(tmp_path / "hf"), *flags)
    assert result.returncode == 0, result.stderr
    assert ("--verify" in (tmp_path / "srun").read_text()) == verified
