"""Tokenizers: loading any kind that Megatron knows, and training a SentencePiece model on text.

Owns the checks that turn a wrong path or type into one line. Encoding is Megatron's and its libraries'.
"""

import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
from megatron.core.tokenizers.utils.build_tokenizer import (
    SP_TOKENIZERS,
    SUPPORTED_TOKENIZERS,
    build_tokenizer,
)
from megatron.training.config import TokenizerConfig

from megatron_clsa.data.indexed import sha256_of
from megatron_clsa.errors import UserError

# The special ids of a model trained here. No pad id: Megatron would mask every target that equals it.
UNKNOWN_ID, BEGIN_ID, END_ID = 0, 1, 2
_CHUNK = 2000  # characters a training sentence; SentencePiece drops sentences over 4192 bytes


def load_tokenizer(args):
    """Megatron's tokenizer for `args`, its parsed arguments or a `TokenizerConfig`; checks them first."""
    check_tokenizer(args.tokenizer_type, args.tokenizer_model)
    try:
        tokenizer = build_tokenizer(args)
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        raise UserError(f"--tokenizer-model {args.tokenizer_model} cannot be loaded: {error}") from None
    if _end_of_document(tokenizer) is None:
        raise UserError(
            f"--tokenizer-model {args.tokenizer_model} has no end-of-document token; set its eos_token: "
            "documents are kept apart by it"
        )
    return tokenizer


def load_tokenizer_of(kind: str, model: str | Path | None):
    """`load_tokenizer` from a type and a path alone."""
    model = model and str(model)
    return load_tokenizer(TokenizerConfig(tokenizer_type=kind, tokenizer_model=model, pad_vocab_size=False))


def check_tokenizer(kind: str | None, model: str | None) -> None:
    """Raise `UserError` unless `model` can be a tokenizer of type `kind`. Loads nothing."""
    if kind not in SUPPORTED_TOKENIZERS:
        known = "SentencePieceTokenizer, HuggingFaceTokenizer"
        raise UserError(f"--tokenizer-type {kind} is not known; give {known} or another of Megatron's types")
    if kind.startswith("Null"):
        return
    if not model:
        raise UserError(f"--tokenizer-model is missing: {kind} needs one")
    path = Path(model)
    if not path.exists():
        raise UserError(f"--tokenizer-model {model} does not exist; make one with tools/train_tokenizer.py")
    if kind in SP_TOKENIZERS:
        _check_sentencepiece(kind, path)
    elif kind == "HuggingFaceTokenizer" and not _is_hugging_face(path):
        raise UserError(
            f"--tokenizer-model {model} is not a Hugging Face tokenizer folder (no tokenizer_config.json, no "
            "tokenizer.json); for a SentencePiece file give --tokenizer-type SentencePieceTokenizer"
        )


def _check_sentencepiece(kind: str, path: Path) -> None:
    if path.is_dir():
        raise UserError(
            f"--tokenizer-model {path} is a folder, {kind} needs a file; for a Hugging Face folder give "
            "--tokenizer-type HuggingFaceTokenizer"
        )
    try:
        sentencepiece.SentencePieceProcessor().LoadFromSerializedProto(path.read_bytes())
    except (RuntimeError, OSError):
        raise UserError(f"--tokenizer-model {path} is not a SentencePiece model") from None


def _is_hugging_face(path: Path) -> bool:
    return path.is_dir() and any(
        (path / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")
    )


def _end_of_document(tokenizer) -> int | None:
    """The end-of-document id, None if there is none (SentencePiece says -1, some libraries raise)."""
    try:
        token = tokenizer.eod
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return None if token is None or token < 0 else token


def tokenizer_digest(path: str | Path | None) -> str | None:
    """SHA-256 of the file that defines a tokenizer, wherever it lies; None where there is no such file."""
    if path is None:
        return None
    path = Path(path)
    candidates = (
        [path] if path.is_file() else [path / "tokenizer.json", path / "tokenizer.model", path / "vocab.json"]
    )
    return next((sha256_of(file) for file in candidates if file.is_file()), None)


def _chunks(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Pieces of at most `_CHUNK` characters of the first `limit` bytes of text."""
    used = 0
    for text in texts:
        for start in range(0, len(text), _CHUNK):
            chunk = text[start : start + _CHUNK].replace("\0", "")
            used += len(chunk.encode())
            if used > limit:
                return
            yield chunk


def train_sentencepiece(
    texts: Iterable[str], model: Path, vocab_size: int, threads: int = 1, max_bytes: int = 512 << 20
) -> sentencepiece.SentencePieceProcessor:
    """Train a BPE model on the first `max_bytes` of `texts` and write it to `model`, whole or not at all.

    Lossless: no normalisation, spaces and line breaks are ordinary characters, unseen ones become bytes.
    """
    proto, bad = io.BytesIO(), []
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_chunks(_until_bad(texts, bad), max_bytes),
            model_writer=proto,
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            byte_fallback=True,
            character_coverage=0.9999,
            unk_id=UNKNOWN_ID,
            bos_id=BEGIN_ID,
            eos_id=END_ID,
            pad_id=-1,
            num_threads=threads,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = UserError(f"--vocab-size {vocab_size} cannot be trained on this text: {_reason(error)}")
        raise (bad or [reason])[0] from None
    if bad:
        raise bad[0]
    temporary = model.with_name(model.name + ".tmp")
    try:
        model.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(proto.getvalue())
        os.replace(temporary, model)
    except OSError as error:
        raise UserError(f"--output {model} cannot be written: {error.strerror}") from None
    return sentencepiece.SentencePieceProcessor(model_proto=proto.getvalue())


def _until_bad(texts: Iterable[str], bad: list[UserError]) -> Iterator[str]:
    """Texts up to the first that is refused, which is kept: SentencePiece would wrap it in its own words."""
    try:
        yield from texts
    except UserError as error:
        bad.append(error)


def _reason(error: Exception) -> str:
    """SentencePiece's message less the source line that it starts with."""
    return str(error).rsplit("] ", 1)[-1].strip() or "there is too little of it"
