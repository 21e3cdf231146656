"""The index of a `torch_dist` checkpoint: which slices its tensors consist of, and where they lie.

Owns `.metadata`, a pickle, of which nothing is executed: an allow-list decides what it may build (torch's own
reader, `torch.distributed.checkpoint.FileSystemReader`, unpickles it as it comes). What it says is held to be
possible before anything is read by it.
"""

import io
import math
import pickle
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import BinaryIO

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_clsa.errors import UserError

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


@dataclass(frozen=True)
class Slice:
    """Part of a tensor.

    Attributes:
        start, shape: which part, by axis.
        file: its name in the checkpoint's folder.
        offset, length: the part's bytes in it.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class IndexEntry:
    """One tensor of the model; its slices are its whole."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    slices: tuple[Slice, ...]


def read_index(path: Path) -> dict[str, IndexEntry]:
    """The model's tensors by name; the optimizer's and what is no tensor are left out.

    Raises:
        UserError: if the file cannot be read or says what no checkpoint can be.
    """
    try:
        index = load_index(io.BytesIO(path.read_bytes()))
        entries = {
            name: _entry(name, found, index.storage_data)
            for name, found in index.state_dict_metadata.items()
            if isinstance(found, TensorStorageMetadata) and not name.startswith("optimizer.")
        }
        _check_places(entries)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # what a damaged pickle builds can fail in any way
        raise UserError(
            f"{path} is damaged or not a checkpoint's: {error}; take another checkpoint"
        ) from None
    return entries


def _entry(name: str, found: TensorStorageMetadata, places: dict) -> IndexEntry:
    shape, dtype = _sizes(found.size), found.properties.dtype
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} has dtype {dtype!r}")
    slices = []
    for chunk in found.chunks:
        start, part = _sizes(chunk.offsets), _sizes(chunk.sizes)
        inside = (first + size <= whole for first, size, whole in zip(start, part, shape, strict=True))
        place = places.get(MetadataIndex(name, chunk.offsets))
        if place is None or not all(inside):
            raise ValueError(f"it has no place for a slice of {name}")
        file = place.relative_path
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"a slice of {name} lies in {file!r}")
        slices.append(Slice(start, part, file, *_sizes((place.offset, place.length))))
    covered = sum(math.prod(piece.shape) for piece in slices)
    if covered != math.prod(shape) or any(_overlap(*pair) for pair in combinations(slices, 2)):
        raise ValueError(f"the slices of {name} are not its whole")
    return IndexEntry(shape, dtype, tuple(slices))


def _overlap(a: Slice, b: Slice) -> bool:
    axes = zip(a.start, a.shape, b.start, b.shape, strict=True)
    return all(i < j + m and j < i + n for i, n, j, m in axes)


def _sizes(values) -> tuple[int, ...]:
    """Whole numbers that can be sizes."""
    values = tuple(values)
    if not all(type(value) is int and 0 <= value < 2**63 for value in values):
        raise ValueError(f"it holds the sizes {values}")
    return values


def _check_places(entries: dict[str, IndexEntry]) -> None:
    """Refuse bytes that belong to two slices: one of them would be read as the other."""
    slices = sorted((p.file, p.offset, p.length) for entry in entries.values() for p in entry.slices)
    for (file, offset, length), (next_file, next_offset, _) in pairwise(slices):
        if file == next_file and offset + length > next_offset:
            raise ValueError(f"two slices share byte {next_offset} of {file}")
