"""The tuning tool names its cases and candidates. Owns no speed claim; candidates run on a GPU."""

import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def run(*arguments):
    command = [sys.executable, os.path.join(ROOT, "tools", "tune_kernels.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": ROOT}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_an_unknown_candidate_is_refused_in_one_line():
    result = run("kd", "--only", "nonsense")
    assert result.returncode == 2
    assert result.stderr.startswith("error: --only nonsense") and "band 16" in result.stderr


def test_a_candidate_that_fails_is_named():
    result = run("topk", "--length", "-1", "--device", "cpu", "--only", "sample of 1 in 8")
    assert "default" in result.stdout and result.stdout.count("failed or took more than") == 2
