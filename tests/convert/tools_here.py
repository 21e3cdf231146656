"""`tools/to_hf.py` and `tools/from_hf.py` in this process, without the seconds that their imports take."""

import io
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

from checkpoints import ROOT


def _run(script: str, words) -> subprocess.CompletedProcess:
    out, err, kept = io.StringIO(), io.StringIO(), (sys.argv, list(sys.path))
    sys.argv, code = [script, *map(str, words)], 0
    try:
        with redirect_stdout(out), redirect_stderr(err):
            runpy.run_path(str(ROOT / "tools" / script), run_name="__main__")
    except SystemExit as left:
        code = left.code or 0
    finally:
        sys.argv, sys.path = kept
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def to_hf(*words) -> subprocess.CompletedProcess:
    return _run("to_hf.py", words)


def from_hf(*words) -> subprocess.CompletedProcess:
    return _run("from_hf.py", words)
