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
    with tempfile.TemporaryDirectory(prefix="evaluate-") as temporary:
        config = export(TorchDistReader(folder), arch, Path(temporary), ExportOptions(tokenizer=chosen))
        write_config(Path(temporary), config)
        yield Path(temporary)
