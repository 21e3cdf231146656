"""Where a tool runs and where it writes, checked before anything is loaded; how it writes a report.

Owns no computation; for the tools that run a Hugging Face model, and a run's writers.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

from megatron_clsa.errors import UserError


def chosen_device(name: str | None):
    """The `torch.device` of `--device name`; None takes a GPU where there is one.

    Raises:
        UserError: if it is no device that these tools run on, or this machine has none such.
    """
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is no device: give cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs; give cpu")
    return device


def check_out(out: Path, flag: str = "--out") -> None:
    """Refuse a folder that cannot be written. Makes nothing.

    Raises:
        UserError: if `out` is a file, or cannot be made or written.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{flag} {out} is a file: give a folder")
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {out}: {there} cannot be written; give another folder")


def write_report(out: Path, name: str, report: object, draw: Callable[[object, Path], None]) -> None:
    """Write `out/NAME.json`, and by `draw(report, path)` `out/NAME.png`.

    Raises:
        UserError: if `out` cannot be written; print first what took long.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
        draw(report, out / f"{name}.png")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from error
