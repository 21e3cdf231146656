"""The tokenizer of an exported folder: a Hugging Face folder is copied, a SentencePiece file translated.

Owns no training of tokenizers and no translation (`sentencepiece_model.py`).
"""

import shutil
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer

from megatron_clsa.convert.sentencepiece_model import fast_from_sentencepiece
from megatron_clsa.errors import UserError

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


def write_tokenizer(source: Path, out: Path, vocab_size: int) -> dict[str, int]:
    """Write `source` (a folder or a SentencePiece file) into `out`. Returns its bos, eos and pad ids.

    Raises:
        UserError: if it cannot be loaded or translated, or has more tokens than the model has rows.
    """
    try:
        if source.is_dir():
            for name in _FILES:
                if (source / name).is_file():
                    shutil.copyfile(source / name, out / name)
            tokenizer = load_tokenizer(source, out)
        else:
            tokenizer = fast_from_sentencepiece(source)
            tokenizer.save_pretrained(out)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # the disk's, not the tokenizer's
        raise UserError(f"--tokenizer {source} cannot be loaded: {error}") from None
    check_tokens(source, len(tokenizer), vocab_size)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {name: value for name, value in ids.items() if value is not None}


def load_tokenizer(source: Path, copy: Path | None = None):
    """transformers' tokenizer of the folder `source`, read from `copy` if one is given.

    Raises:
        UserError: if there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(copy or source, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise many kinds
        raise UserError(f"--tokenizer {source} cannot be loaded: {error or type(error).__name__}") from None


def check_tokens(source: Path, tokens: int, vocab_size: int) -> None:
    """Refuse a tokenizer with ids that the model has no row for."""
    if tokens > vocab_size:
        raise UserError(
            f"--tokenizer {source} has {tokens} tokens, the model's vocabulary {vocab_size}: "
            "give the tokenizer that the model was trained with"
        )


def count_tokens(source: Path) -> int:
    """Tokens of a folder's or a SentencePiece file's tokenizer, without transformers."""
    try:
        if (source / "tokenizer.json").is_file():
            return Tokenizer.from_file(str(source / "tokenizer.json")).get_vocab_size()
        path = source / "tokenizer.model" if source.is_dir() else source
        model = sentencepiece.SentencePieceProcessor()
        model.LoadFromSerializedProto(path.read_bytes())
        return model.GetPieceSize()
    except Exception as error:  # the tokenizers library raises bare ones
        raise UserError(f"--tokenizer {source} cannot be loaded: {error}") from None
