"""What `examples/quickstart.sh` refuses before it makes an environment or trains. CI runs it whole."""

import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart.sh"


def quickstart(*words) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", SCRIPT, *words], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "words, said", [(["--steps", "3"], "--steps"), (["--out"], "--out"), (["--out="], "--out=")]
)
def test_unknown_and_incomplete_flags_are_one_line_and_exit_2(words, said):
    result = quickstart(*words)
    assert result.returncode == 2
    assert said in result.stderr and result.stderr.startswith("error:") and result.stderr.count("\n") == 1


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    kept = tmp_path / "thesis.tex"
    kept.write_text("chapter 1")
    for out in (tmp_path, kept):
        result = quickstart("--out", out)
        assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
        assert str(out) in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_at_once_in_one_folder_are_refused(tmp_path):
    (tmp_path / "data").mkdir()
    held = subprocess.Popen(["flock", tmp_path, "sleep", "60"])
    try:
        while not subprocess.run(["flock", "--nonblock", tmp_path, "true"]).returncode:
            assert held.poll() is None
        result = quickstart("--out", tmp_path)
    finally:
        held.kill()
    assert result.returncode == 2 and "another quickstart is running" in result.stderr


def test_help_takes_as_long_as_the_readme():
    readme = (SCRIPT.parents[1] / "README.md").read_text()
    took = re.search(r"about (\w+ minutes) on two cores", readme)[1]
    assert f"about {took} on two cores" in quickstart("--help").stdout


def test_help_names_the_files_that_it_leaves():
    said = quickstart("--help").stdout
    assert all(name in said for name in ("DIR/hf", "DIR/metrics.jsonl", "DIR/report.json", "DIR/loss.png"))
