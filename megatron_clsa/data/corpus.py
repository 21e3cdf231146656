"""Real text that every machine has: the Python standard library's sources, as JSONL.

Owns which files are taken and in which order. The quickstart trains on it.
"""

import hashlib
import json
import os
import sys
import sysconfig
from pathlib import Path

from megatron_clsa.errors import OneLineParser, UserError, one_line_errors

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def standard_library_sources() -> list[Path]:
    """The interpreter's own .py files without tests, ordered by a hash of their names.

    The same order everywhere; unlike the alphabet it spreads every subject over a train/valid split.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [p.relative_to(root) for p in root.rglob("*.py")]
    names = [name for name in names if not _LEFT_OUT & set(name.parts)]
    return [root / n for n in sorted(names, key=lambda n: hashlib.sha256(n.as_posix().encode()).digest())]


def write_standard_library(path: Path, max_bytes: int = 16 << 20) -> int:
    """Write up to `max_bytes` of sources to `path`, one document a line; the number of documents."""
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    used = count = 0
    with temporary.open("w", encoding="utf-8") as out:
        for source in standard_library_sources():
            try:
                text = source.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            if not text or used + len(text) > max_bytes:
                continue
            used, count = used + len(text), count + 1
            out.write(json.dumps({"text": text}) + "\n")
    if not count:
        raise UserError("this Python has no library sources (a minimal installation?); give your own text")
    os.replace(temporary, path)
    return count


@one_line_errors
def main(words: list[str]) -> None:
    """`python -m megatron_clsa.data.corpus FILE` writes the corpus."""
    parser = OneLineParser(description="Write the standard library's sources as JSONL.")
    parser.add_argument("file", type=Path, help="JSONL file to write")
    path = parser.parse_args(words).file
    try:
        print(f"{path}: {write_standard_library(path):,} documents")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
