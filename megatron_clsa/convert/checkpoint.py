"""Reads tensors of a `torch_dist` checkpoint one at a time, of any parallel layout, without megatron.

Owns the file format: the index in `.metadata`, the slices in `*.distcp`. Executes nothing that a checkpoint
holds: the index is unpickled with an allow-list, slices with `weights_only=True`, after their CRC is checked.
torch's own reader (`torch.distributed.checkpoint.FileSystemReader`) unpickles the index as it comes.
"""

import io
import pickle
import zipfile
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_clsa.convert.manifest import complete_steps, step_folder
from megatron_clsa.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    (_METADATA, name)
    for name in (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
}


class _IndexUnpickler(pickle.Unpickler):
    """Builds the classes that torch writes into `.metadata`, and no others."""

    def find_class(self, module: str, name: str):
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def load_index(file: BinaryIO):
    """The index of a checkpoint (`.metadata`). Runs nothing that a file may hold.

    Raises:
        pickle.UnpicklingError: if it holds anything else than an index.
    """
    try:
        return _IndexUnpickler(file).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise pickle.UnpicklingError(f"not an index: {error}") from None


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
        try:
            index = _IndexUnpickler(io.BytesIO((folder / ".metadata").read_bytes())).load()
            self._slices = index.storage_data
            self._tensors = {
                name: entry
                for name, entry in index.state_dict_metadata.items()
                if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
            }
        except OSError as error:
            raise UserError(f"{folder} cannot be read: {error}") from None
        except Exception as error:  # a damaged pickle can fail in any way
            raise UserError(f"{folder / '.metadata'} is damaged or not a checkpoint's: {error}") from None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every model tensor, by name, in no particular order."""
        return {name: tuple(entry.size) for name, entry in self._tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].properties.dtype

    def read(self, name: str) -> Tensor:
        """The whole tensor, put together from the slices of all ranks.

        Raises:
            UserError: naming the file whose bytes are missing, cut or changed.
        """
        entry = self._tensors[name]
        if sum(torch.Size(chunk.sizes).numel() for chunk in entry.chunks) != entry.size.numel():
            raise UserError(f"{self.folder / '.metadata'} is damaged: the slices of {name} are not its whole")
        if len(entry.chunks) == 1:
            return self._read_chunk(name, entry.chunks[0]).view(entry.size)
        whole = torch.empty(entry.size, dtype=entry.properties.dtype)
        for chunk in entry.chunks:
            part = self._read_chunk(name, chunk)
            target = whole
            for axis, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                target = target.narrow(axis, offset, size)
            target.copy_(part.view(target.shape))
        return whole

    def _read_chunk(self, name: str, chunk) -> Tensor:
        place = self._slices.get(MetadataIndex(name, chunk.offsets))
        if place is None:
            raise UserError(f"{self.folder / '.metadata'} is damaged: it has no place for a slice of {name}")
        tensor = self._read_slice(self.folder / place.relative_path, place.offset, place.length)
        if not isinstance(tensor, Tensor) or tensor.numel() != torch.Size(chunk.sizes).numel():
            raise UserError(f"{self.folder / place.relative_path} holds something else than {name}")
        return tensor

    def _read_slice(self, path: Path, offset: int, length: int):
        try:
            with path.open("rb", buffering=0) as file, io.BufferedReader(_Part(file, offset, length)) as data:
                broken = zipfile.ZipFile(data).testzip()
                if broken is not None:
                    raise zipfile.BadZipFile(f"checksum of {broken} differs")
                data.seek(0)
                return torch.load(data, weights_only=True, map_location="cpu")
        except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0]
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
