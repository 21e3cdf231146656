"""The environment maker (tools/environment.sh): which Python it takes and what it says when there is none.

Installs nothing: interpreters are small scripts on a PATH of the test's own.
"""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def _program(folder: Path, name: str, body: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def _shell(command: str, path: Path) -> subprocess.CompletedProcess:
    """Run `command` in a shell that has sourced the file and sees only `path` and the system's tools."""
    script = f'source "{ROOT}/tools/environment.sh"; {command}'
    environment = {**os.environ, "PATH": f"{path}:/usr/bin:/bin"}
    return subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)


def test_a_shim_without_an_interpreter_behind_it_is_passed_over(tmp_path):
    _program(tmp_path / "bin", "python3.12", "exit 127")
    _program(tmp_path / "bin", "pyenv", "exit 1")
    _program(tmp_path / "bin", "python3", "echo /the/python3")
    assert _shell("_clsa_find_python", tmp_path / "bin").stdout == "/the/python3\n"


def test_the_newest_3_12_of_pyenv_is_taken(tmp_path):
    _program(tmp_path / "bin", "pyenv", "printf '3.11.7\\n3.12.1\\n3.12.10\\n3.13.0\\n'")
    _program(tmp_path / "bin", "python3.12", '[ "$PYENV_VERSION" ] || exit 127; echo /pyenv/$PYENV_VERSION')
    assert _shell("_clsa_find_python", tmp_path / "bin").stdout == "/pyenv/3.12.10\n"


def _environment_in(root: Path) -> subprocess.CompletedProcess:
    """Call `clsa_environment` for a checkout at `root` that has empty package files."""
    for name in ("pyproject.toml", "setup.py"):
        (root / name).touch()
    return _shell(f'_clsa_root="{root}"; clsa_environment; echo unreached', root / "bin")


def test_no_python_is_one_line_and_exit_code_2(tmp_path):
    for name in ("python3.12", "python3", "pyenv"):
        _program(tmp_path / "bin", name, "exit 1")
    result = _environment_in(tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: no Python 3.12 found")


def test_a_half_made_environment_is_made_anew(tmp_path):
    _program(tmp_path / "bin", "python3.12", f'[ "$1" = -c ] && echo {tmp_path}/bin/python3.12 || exit 9')
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "left over").write_text("from a killed installation")
    result = _environment_in(tmp_path)
    assert result.returncode == 2 and "-m venv' failed" in result.stderr
    assert not (tmp_path / ".venv").exists()
