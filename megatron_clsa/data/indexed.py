"""Whether a pair of .bin and .idx files is sound, told without reading the data.

Owns the checks, the manifest beside the pair, and a fingerprint. Reading tokens is Megatron's IndexedDataset.
An .idx file is a 34-byte head (magic, version, dtype code, counts), then per sequence its length (int32)
and byte offset (int64), then per document its first sequence (int64). A sequence here is one document.
"""

import hashlib
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy
from megatron.core.datasets.indexed_dataset import DType

from megatron_clsa.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEAD = struct.Struct("<9sQBQQ")
_EDGE = 1 << 16  # bytes of each end of an index that enter the fingerprint


@dataclass(frozen=True)
class IndexHead:
    """The head of an .idx file."""

    dtype: type[numpy.number]
    sequences: int
    documents: int

    @property
    def size(self) -> int:
        """Bytes that the whole .idx file must have."""
        return _HEAD.size + 12 * self.sequences + 8 * (self.documents + 1)


def file_of(prefix: str | Path, suffix: str) -> Path:
    """`prefix` + `suffix` as a path; a prefix may itself contain dots."""
    return Path(f"{prefix}{suffix}")


def manifest_path(prefix: str | Path) -> Path:
    """Where preprocessing leaves what it made: counts, tokenizer, checksums."""
    return file_of(prefix, ".manifest.json")


def read_manifest(prefix: str | Path) -> dict | None:
    """The manifest of a pair that tools/preprocess_data.py made, None for a pair from elsewhere."""
    path = manifest_path(prefix)
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); preprocess the data again") from None


def _read_head(path: Path) -> IndexHead:
    with path.open("rb") as file:
        raw = file.read(_HEAD.size)
    if len(raw) < _HEAD.size or raw[: len(_MAGIC)] != _MAGIC:
        raise UserError(f"{path} is not the index of a Megatron dataset; preprocess the data again")
    _, version, code, sequences, documents = _HEAD.unpack(raw)
    if version != 1 or code not in {dtype.value for dtype in DType}:
        raise UserError(f"{path} has version {version} and dtype code {code}, which Megatron cannot read")
    return IndexHead(DType.dtype_from_code(code), sequences, documents - 1)


def _bytes_indexed(path: Path, head: IndexHead) -> int:
    """Bytes of .bin that the last sequence of the index ends at."""
    with path.open("rb") as file:
        file.seek(_HEAD.size + 4 * (head.sequences - 1))
        (length,) = struct.unpack("<i", file.read(4))
        file.seek(_HEAD.size + 12 * head.sequences - 8)
        (offset,) = struct.unpack("<q", file.read(8))
    return offset + length * DType.size(head.dtype)


def check_pair(prefix: str | Path) -> IndexHead:
    """Raise `UserError` unless PREFIX.bin and PREFIX.idx exist, belong together and are complete."""
    binary, index = file_of(prefix, ".bin"), file_of(prefix, ".idx")
    for path in (index, binary):
        if not path.is_file():
            hint = " (leave .bin or .idx out)" if str(prefix).endswith((".bin", ".idx")) else ""
            raise UserError(
                f"no dataset at {prefix}{hint}: {path} is missing; make it with tools/preprocess_data.py"
            )
    head = _read_head(index)
    if head.sequences < 1:
        raise UserError(f"{index} holds no document")
    if index.stat().st_size != head.size:
        raise UserError(
            f"{index} has {index.stat().st_size} bytes, its head says {head.size}: truncated or damaged"
        )
    indexed, found = _bytes_indexed(index, head), binary.stat().st_size
    if indexed != found:
        raise UserError(
            f"{binary} has {found} bytes, its index describes {indexed}: truncated, or of another index"
        )
    return head


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_checksums(prefix: str | Path) -> dict:
    """Read the pair whole and compare it to its manifest, which is returned. Minutes for large data."""
    check_pair(prefix)
    manifest = read_manifest(prefix)
    if manifest is None:
        raise UserError(f"{manifest_path(prefix)} is missing: nothing to verify {prefix} against")
    for suffix in (".bin", ".idx"):
        path = file_of(prefix, suffix)
        if sha256_of(path) != manifest["sha256"][suffix]:
            raise UserError(
                f"{path} does not match its checksum in {manifest_path(prefix)}: damaged; preprocess again"
            )
    return manifest


def fingerprint(prefixes: list[str]) -> str:
    """Sixteen hexadecimal digits that change when the content behind any of `prefixes` does.

    From sizes, manifests and both ends of every index: all ranks get the same without reading the data.
    """
    digest = hashlib.sha256()
    for prefix in prefixes:
        manifest, index = manifest_path(prefix), file_of(prefix, ".idx")
        digest.update(f"{file_of(prefix, '.bin').stat().st_size} {index.stat().st_size}".encode())
        digest.update(manifest.read_bytes() if manifest.is_file() else b"")
        with index.open("rb") as file:
            digest.update(file.read(_EDGE))
            file.seek(max(0, index.stat().st_size - _EDGE))
            digest.update(file.read(_EDGE))
    return digest.hexdigest()[:16]


def write_index(path: Path, dtype: type[numpy.number], lengths: numpy.ndarray) -> None:
    """Write an .idx of one sequence a document. Megatron's writer loops in Python over every document."""
    offsets = numpy.zeros(len(lengths), dtype=numpy.int64)
    numpy.cumsum(lengths[:-1], out=offsets[1:], dtype=numpy.int64)
    with path.open("wb") as file:
        code = DType.code_from_dtype(dtype)
        file.write(_HEAD.pack(_MAGIC, 1, code, len(lengths), len(lengths) + 1))
        file.write(lengths.astype(numpy.int32).tobytes())
        file.write((offsets * DType.size(dtype)).tobytes())
        file.write(numpy.arange(len(lengths) + 1, dtype=numpy.int64).tobytes())
        file.flush()
        os.fsync(file.fileno())
