"""Reads tensors of a `torch_dist` checkpoint one at a time, of any parallel layout, without megatron.

Owns the folder and the slices in `*.distcp`; the index is `dist_index.py`'s. Executes nothing that a slice
holds: it is loaded with `weights_only=True`, after its CRC is checked.

Where there is a manifest, a file is held to its SHA-256 before its first slice is used. A slice's CRC lies in
the file itself, and no slice names its tensor: a file of another run, with the same shapes, would pass. One
more pass over the files is little beside the training that made them; files without weights are left out.
"""

import io
import math
import zipfile
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from megatron_clsa.convert import manifest
from megatron_clsa.convert.dist_index import IndexEntry, Slice, read_index
from megatron_clsa.convert.manifest import complete_steps, step_folder
from megatron_clsa.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"


def find_checkpoint(path: Path) -> Path:
    """The folder with `.metadata`: `path`, or the newest checkpoint of the phase or run folder `path`.

    Raises:
        UserError: if there is none.
    """
    if not path.is_dir():
        raise UserError(f"{path} is no folder: give a run's folder, a phase's or one of its iter_* folders")
    if (path / ".metadata").is_file():
        return path
    complete = complete_steps(path)
    if complete:
        return step_folder(path, complete[0])
    tracker = path / TRACKER
    if tracker.is_file():
        step = tracker.read_text(errors="replace").strip()
        folder = path / (f"iter_{int(step):07d}" if step.isdigit() else step)
        if (folder / ".metadata").is_file():
            return folder
        raise UserError(
            f"{tracker} names {folder.name}, which is not a complete checkpoint; give another one"
        )
    phases = sorted((path / "checkpoints").glob(f"*/{TRACKER}"))
    if phases:
        return find_checkpoint(phases[-1].parent)
    raise UserError(
        f"{path} holds no checkpoint: give a run's folder, a phase's or one of its iter_* folders"
    )


class TorchDistReader:
    """One checkpoint folder, opened: names and shapes at once, tensors when asked.

    Raises:
        UserError: if the folder is not a readable checkpoint.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        sealed = (folder / manifest.NAME).is_file()
        self._records = manifest.read_manifest(folder) if sealed else None
        self._sound: set[str] = set()
        self._check_file(".metadata")
        self._tensors = read_index(folder / ".metadata")

    def _check_file(self, name: str) -> None:
        """Hold a file to the manifest, once."""
        if self._records is None or name in self._sound:
            return
        if fault := manifest.listed_fault(self.folder, name, self._records, "save"):
            raise UserError(f"{fault}; take another checkpoint")
        self._sound.add(name)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every model tensor, by name, in no particular order."""
        return {name: entry.shape for name, entry in self._tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str) -> Tensor:
        """The whole tensor, put together from the slices of all ranks.

        Raises:
            UserError: naming the file whose bytes are missing, cut or changed.
        """
        entry = self._tensors[name]
        if len(entry.slices) == 1:
            return self._read_slice(name, entry, entry.slices[0]).view(entry.shape)
        whole = torch.empty(entry.shape, dtype=entry.dtype)
        for piece in entry.slices:
            part = self._read_slice(name, entry, piece)
            target = whole
            for axis, (offset, size) in enumerate(zip(piece.start, piece.shape, strict=True)):
                target = target.narrow(axis, offset, size)
            target.copy_(part.view(target.shape))
        return whole

    def _read_slice(self, name: str, entry: IndexEntry, piece: Slice) -> Tensor:
        self._check_file(piece.file)
        path = self.folder / piece.file
        tensor = self._load(path, piece.offset, piece.length)
        fits = isinstance(tensor, Tensor) and tensor.numel() == math.prod(piece.shape)
        if not fits or tensor.dtype != entry.dtype:
            raise UserError(f"{path} holds something else than {name}; take another checkpoint")
        return tensor

    def _load(self, path: Path, offset: int, length: int):
        try:
            with path.open("rb", buffering=0) as file, io.BufferedReader(_Part(file, offset, length)) as data:
                broken = zipfile.ZipFile(data).testzip()
                if broken is not None:
                    raise zipfile.BadZipFile(f"checksum of {broken} differs")
                data.seek(0)
                return torch.load(data, weights_only=True, map_location="cpu")
        except Exception as error:  # a damaged archive or pickle can fail in any way
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(
                f"{path} is damaged at byte {offset}: {reason}; take another checkpoint"
            ) from None


class _Part(io.RawIOBase):
    """`length` bytes of an open file from `offset` on, as a file: a slice is not copied to be looked into."""

    def __init__(self, file: BinaryIO, offset: int, length: int):
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise OSError("a place before the slice's first byte")
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer) -> int:
        room = max(0, min(len(buffer), self._length - self._at))
        self._file.seek(self._offset + self._at)
        count = self._file.readinto(memoryview(buffer)[:room])
        self._at += count
        return count
