"""A folder that appears whole or not at all, never on top of what it is made from.

Owns the temporary folder, the renames and the system's errors on the way; knows nothing of what is written.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_clsa.errors import UserError

_FULL = {errno.ENOSPC: "No space left on device", errno.EDQUOT: "Disk quota exceeded"}


@contextmanager
def whole_folder(out: Path, force: bool, sources: tuple[Path, ...] = ()) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place if the block ends well, and goes if not.

    Args:
        out: a link is followed: what it points to is made or replaced.
        force: replace the folder `out` if there is one.
        sources: what the block reads, which stays as it is.
    Raises:
        UserError: if `out` exists and `force` is not given, would change a source, or cannot be written.
    """
    try:
        out = _checked(out, force, sources)
    except OSError as error:
        raise UserError(f"{out} cannot be made: {error}") from error
    temporary = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _publish(temporary, out, force)
    except UserError:
        raise
    except Exception as error:
        if _disk_full(error):
            raise UserError(f"{out.parent} is full: nothing was written; free some space") from None
        if isinstance(error, OSError):
            raise UserError(f"{out} cannot be made: {error}") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _checked(out: Path, force: bool, sources: tuple[Path, ...]) -> Path:
    """`out` without links, once it is known to be free or to be replaced."""
    whole = out.resolve()
    if not whole.name:
        raise UserError(f"{out} is the root of the file system: give a folder to make")
    for source in (path.resolve() for path in sources):
        if whole == source or whole in source.parents:
            raise UserError(f"{out} holds {source}, which is read: give another folder to make")
        if source in whole.parents:
            raise UserError(f"{out} lies in {source}, which is read: give a folder outside of it")
    if whole.exists() and not whole.is_dir():
        raise UserError(f"{out} is a file: give a folder to make")
    if whole.exists() and not force:
        raise UserError(f"{out} exists: give another folder, or --force to replace it")
    return whole


def _publish(temporary: Path, out: Path, force: bool) -> None:
    if not out.exists():
        temporary.rename(out)
        return
    if not force:
        raise UserError(f"{out} was made by another process meanwhile: give another folder")
    replaced = out.with_name(f".{out.name}.{os.getpid()}.replaced")
    out.rename(replaced)
    try:
        temporary.rename(out)
    except OSError:
        with suppress(OSError):
            replaced.rename(out)
        raise
    shutil.rmtree(replaced)


def _disk_full(error: BaseException | None) -> bool:
    """Some libraries report the system's errors as text, torch.save raises one of its own in its place."""
    while error is not None:
        if getattr(error, "errno", None) in _FULL or any(said in str(error) for said in _FULL.values()):
            return True
        error = error.__context__
    return False
