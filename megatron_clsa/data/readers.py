"""Documents of JSONL, .zst JSONL, Parquet and plain text files, cut into parts that run in parallel.

Owns finding, cutting and decoding inputs, and what counts as a bad line. Tokens are preprocess.py's.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from megatron_clsa.errors import UserError, half_character

JSON_SUFFIXES = {".jsonl", ".json", ".ndjson"}
_BLOCK = 1 << 20  # bytes read at a time
_PACKED = {".zst": "zstandard", ".parquet": "pyarrow"}


@dataclass(frozen=True)
class Part:
    """What one worker reads at a time: whole files, or the lines of one file that start in [start, end)."""

    files: tuple[str, ...]
    start: int = 0
    end: int | None = None


class BadDocument(UserError):
    """A document that cannot be used; `--skip-bad-lines` counts it and goes on."""


def list_inputs(inputs: list[str]) -> list[Path]:
    """The files that `inputs` name; a folder stands for all files under it, sorted."""
    files: list[Path] = []
    for name in inputs:
        path = Path(name)
        if not path.exists():
            raise UserError(f"--input {name} does not exist")
        found = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        if not found:
            raise UserError(f"--input {name} is a folder without files")
        files += found
    for path in files:
        if path.stat().st_size == 0 and is_lines(path):
            raise UserError(f"--input {path} is empty")
        if path.suffix in _PACKED:
            _optional(path)
    return files


def is_lines(path: Path) -> bool:
    """Whether a file holds many documents; any other file is one document."""
    return path.suffix in JSON_SUFFIXES | set(_PACKED)


def _optional(path: Path):
    package = _PACKED[path.suffix]
    try:
        return import_module(package)
    except ImportError:
        raise UserError(
            f"--input {path}: reading {path.suffix} needs {package}: pip install 'megatron_clsa[data]'"
        ) from None


def plan_parts(files: list[Path], part_bytes: int) -> list[Part]:
    """Cut the inputs, in order, into parts of about `part_bytes`; equal inputs give equal parts."""
    parts: list[Part] = []
    texts: list[str] = []
    size = 0
    for path in files:
        if not is_lines(path):
            texts.append(str(path))
            size += path.stat().st_size
        if texts and (is_lines(path) or size >= part_bytes):
            parts.append(Part(tuple(texts)))
            texts, size = [], 0
        if path.suffix in JSON_SUFFIXES:
            total = path.stat().st_size
            parts += [
                Part((str(path),), at, min(at + part_bytes, total)) for at in range(0, total, part_bytes)
            ]
        elif is_lines(path):
            parts.append(Part((str(path),)))
    return [*parts, Part(tuple(texts))] if texts else parts


def documents(part: Part, key: str) -> Iterator[str | BadDocument]:
    """The texts of a part in order; a bad one comes as the error that names it. Blank lines do not count.

    Raises:
        UserError: if a file as a whole cannot be read: what is lost then is no single document.
    """
    for name in part.files:
        path = Path(name)
        try:
            yield from _documents_of(path, part, key)
        except OSError as error:
            raise UserError(f"--input {path} cannot be read: {error.strerror or error}") from None


def _documents_of(path: Path, part: Part, key: str) -> Iterator[str | BadDocument]:
    if not is_lines(path):
        yield _whole_file(path)
    elif path.suffix == ".parquet":
        yield from _parquet(path, key)
    else:
        lines = _zst_lines(path) if path.suffix == ".zst" else _lines_from(path, part.start, part.end)
        for where, line in lines:
            if line.strip():
                yield _text_of(line, key, path, where)


def _whole_file(path: Path) -> str | BadDocument:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return BadDocument(f"{path} is not UTF-8 text (byte {error.start})")


def _lines_from(path: Path, start: int, end: int | None) -> Iterator[tuple[int, bytes]]:
    """(byte offset, line) of the lines that start in [start, end)."""
    with path.open("rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()  # the line that reaches into this part belongs to the one before
        at = file.tell()
        while at < end and (line := file.readline()):
            yield at, line
            at += len(line)


def _zst_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(negative line number, line): offsets into compressed data would help nobody."""
    zstandard, number, rest = _optional(path), 0, b""
    try:
        for block in _unpacked(zstandard, path):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                number += 1
                yield -number, line
    except zstandard.ZstdError as error:
        raise UserError(f"--input {path} is damaged after line {number}: {error}") from None
    yield -(number + 1), rest


def _unpacked(zstandard, path: Path) -> Iterator[bytes]:
    """Blocks of every frame of a file. The library's own reader takes a file that was cut for a whole one."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # as `zstd --long=31` packs
    with path.open("rb") as file:
        packed = file.read(_BLOCK)
        while packed:
            frame = decompressor.decompressobj(write_size=_BLOCK)
            while not frame.eof:
                if not packed:
                    raise zstandard.ZstdError("the file ends within its data: it is cut off")
                yield frame.decompress(packed)
                packed = b"" if frame.eof else file.read(_BLOCK)
            packed = frame.unused_data or file.read(_BLOCK)


def _parquet(path: Path, key: str) -> Iterator[str | BadDocument]:
    arrow, row = _optional(path), 0
    try:
        table = import_module("pyarrow.parquet").ParquetFile(path)
        names = table.schema_arrow.names
        if key not in names:
            yield BadDocument(
                f"{path} has no column '{key}' (it has: {', '.join(names)}); give --json-keys KEY"
            )
            return
        for batch in table.iter_batches(columns=[key], batch_size=1024):
            for text in batch.column(0).to_pylist():
                row += 1
                yield text if isinstance(text, str) else BadDocument(f"{path}: row {row} has no text")
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"--input {path} is damaged after row {row}: {error}") from None


def _text_of(line: bytes, key: str, path: Path, where: int) -> str | BadDocument:
    """The document of one JSON line; `where` is its byte offset, or minus its line number."""

    def bad(why: str) -> BadDocument:
        return BadDocument(f"{path}:{_line_number(path, where)}: {why}")

    try:
        record = json.loads(line.decode("utf-8-sig"))  # of bytes, json takes half characters for whole
    except (ValueError, RecursionError) as error:
        return bad(f"not JSON ({error}); mend the line or give --skip-bad-lines")
    if not isinstance(record, dict):
        return bad(f"a JSON {type(record).__name__}, not an object with the key '{key}'")
    if key not in record:
        return bad(f"no key '{key}' (its keys: {', '.join(record)}); give --json-keys KEY")
    if not isinstance(record[key], str):
        return bad(f"'{key}' is of type {type(record[key]).__name__}, not a string")
    if b"\\u" in line and half_character(record[key]) is not None:
        return bad(f"'{key}' holds half a character (an unpaired \\ud... escape)")
    return record[key]


def _line_number(path: Path, where: int) -> int:
    """Counted only when there is something to say: workers know their byte offset alone."""
    if where < 0:
        return -where
    number, left = 1, where
    with path.open("rb") as file:
        while left and (block := file.read(min(left, 1 << 20))):
            number, left = number + block.count(b"\n"), left - len(block)
    return number
