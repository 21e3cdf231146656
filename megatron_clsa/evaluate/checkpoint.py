"""A Megatron checkpoint as a folder that the evaluation can open, made for as long as it runs.

Owns the temporary folder; reading and writing are megatron_clsa/convert's, which needs no megatron-core.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_clsa.convert.architecture import read_architecture
from megatron_clsa.convert.checkpoint import TorchDistReader, find_checkpoint
from megatron_clsa.convert.export import ExportOptions, export, write_config
from megatron_clsa.convert.whole_folder import whole_folder
from megatron_clsa.errors import UserError


@contextmanager
def as_folder(model: Path, tokenizer: Path | None) -> Iterator[Path]:
    """`model` itself if it is a Hugging Face folder, else the export of the checkpoint in it.

    Args:
        tokenizer: for a checkpoint: folder or SentencePiece file; None takes the one of training.
    """
    if not model.is_dir():
        raise UserError(f"--model {model} is no folder; give a Hugging Face folder or a checkpoint")
    if (model / "config.json").is_file():
        yield model
        return
    folder = find_checkpoint(model)
    arch = read_architecture(folder)
    trained_with = Path(arch.tokenizer_model) if arch.tokenizer_model else None
    chosen = tokenizer or trained_with
    if chosen is None or not chosen.exists():
        raise UserError(
            f"--model {model} is a checkpoint and its tokenizer {chosen} is gone: give --tokenizer"
        )
    reader = TorchDistReader(folder)
    with _place(model) as place:
        with whole_folder(place / "hf", force=False, sources=(folder,)) as temporary:
            write_config(temporary, export(reader, arch, temporary, ExportOptions(tokenizer=chosen)))
        yield place / "hf"


@contextmanager
def _place(model: Path) -> Iterator[Path]:
    """A folder for as long as the block runs."""
    try:
        made = tempfile.TemporaryDirectory(prefix="evaluate-")
    except OSError as error:
        raise UserError(
            f"--model {model} is exported into a temporary folder first: {error}; give another in TMPDIR"
        ) from None
    with made as place:
        yield Path(place)
