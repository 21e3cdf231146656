"""The manifest of a checkpoint, written last: its files with sizes and SHA-256. Without it, no checkpoint.

Owns what "complete" means and what is kept. Imports neither torch nor megatron; who saves and who loads is in
training/, what the files hold in checkpoint.py.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

from megatron_clsa.errors import UserError

NAME = "manifest.json"
SCHEMA = 1
_PREFIX = "iter_"

FileRecord = dict[str, int | str]  # {"bytes": size, "sha256": hexadecimal}


def step_folder(phase: Path, step: int) -> Path:
    return phase / f"{_PREFIX}{step:07d}"


def describe(path: Path) -> FileRecord:
    """Size and checksum of a file as it can be read now."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def write_whole(path: Path, text: str) -> None:
    """Write a small file such that it exists whole or not at all, after a power cut too."""
    draft = path.with_name(path.name + ".tmp")
    with draft.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal(folder: Path, files: dict[str, FileRecord], about: dict) -> None:
    """Make what lies in `folder` a checkpoint. Everything that it consists of is on disk by now.

    Args:
        files: by name, what was written.
        about: further facts to keep with it, such as versions.
    """
    _sync_folder(folder)
    write_whole(folder / NAME, json.dumps({"schema": SCHEMA, **about, "files": files}, indent=1) + "\n")
    _sync_folder(folder.parent)


def unseal(folder: Path) -> None:
    """Empty a folder that is about to be written, manifest first: from now on it is no checkpoint."""
    (folder / NAME).unlink(missing_ok=True)
    for path in folder.iterdir():
        path.unlink()


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """The files that a checkpoint consists of.

    Raises:
        UserError: if the manifest is missing, damaged or of a later version.
    """
    path = folder / NAME
    try:
        content = json.loads(path.read_text())
        schema, files = content["schema"], content["files"]
        for name, record in files.items():
            if Path(name).name != name or not isinstance(record["bytes"], int) or not record["sha256"]:
                raise ValueError(f"it names {name}")
    except FileNotFoundError:
        raise UserError(f"{folder} has no {NAME}: its save was cut short") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if schema != SCHEMA:
        raise UserError(
            f"{path} has schema {schema}, this version reads {SCHEMA}: load it with the later one"
        )
    return files


def is_complete(folder: Path) -> bool:
    """Whether all files are there in their sizes. Cheap; `file_fault` reads them."""
    try:
        files = read_manifest(folder)
        return all((folder / name).stat().st_size == record["bytes"] for name, record in files.items())
    except (UserError, OSError):
        return False


def file_fault(folder: Path, name: str, record: FileRecord) -> str | None:
    """What is wrong with one file, None if it is what was written."""
    path = folder / name
    try:
        size = path.stat().st_size
        if size != record["bytes"]:
            return f"{path} has {size} bytes instead of {record['bytes']}"
        if describe(path)["sha256"] != record["sha256"]:
            return f"{path} was changed after it was written: its SHA-256 differs"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return None


def listed_fault(folder: Path, name: str, records: dict[str, FileRecord], whole: str) -> str | None:
    """As `file_fault`; a file that the manifest does not list is one, too. `whole`: what it is no part of."""
    if name not in records:
        return f"{folder / name} was not part of this {whole}"
    return file_fault(folder, name, records[name])


def steps_in(phase: Path) -> list[int]:
    """Steps that a phase's folder has a folder of, complete or not, newest first."""
    names = [path.name.removeprefix(_PREFIX) for path in phase.glob(_PREFIX + "*") if path.is_dir()]
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def complete_steps(phase: Path) -> list[int]:
    """Steps of the complete checkpoints, newest first."""
    return [step for step in steps_in(phase) if is_complete(step_folder(phase, step))]


def prune(phase: Path, keep_last: int, keep_every: int | None) -> list[int]:
    """Delete complete checkpoints but the newest `keep_last` and those at multiples of `keep_every`.

    Returns the steps that are gone. A deletion that is cut short leaves no manifest, hence no checkpoint.
    """
    old = complete_steps(phase)[keep_last:]
    old = [step for step in old if not keep_every or step % keep_every]
    for step in old:
        discard(step_folder(phase, step))
    return old


def discard(folder: Path) -> None:
    (folder / NAME).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
