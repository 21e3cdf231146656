"""A SentencePiece model as a transformers tokenizer, so that AutoTokenizer loads it without SentencePiece.

Owns the translation and the proof of it: both encode the same probe, and a difference is refused.
transformers 5.17's own converter takes no BPE model (its `SpmConverter` hands the scores over as a type) and
assumes a normaliser where it takes a unigram one; its merge rules are used.
"""

from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from megatron_clsa.errors import UserError

_UNIGRAM, _BPE = 1, 2  # trainer_spec.model_type
_NORMAL, _UNKNOWN, _CONTROL, _USER, _BYTE = 1, 2, 3, 4, 6  # a piece's type
# What normalisers, prefixes and byte fallback treat in different ways.
_PROBE = (
    "def read(self, size=-1): return 3.14",
    "  two  spaces,\ttab\n\n\r\n    four\u00a0hard\u200b  ",
    "naïve café e\u0301 ﬁ ½ Ⅷ \uff11\uff12 — 東京 ﷺ 🙂 👩\u200d👧 \u2581 0123456789",
    " ",
    "Straße\nİstanbul",
)


def fast_from_sentencepiece(path: Path):
    """A transformers tokenizer with the ids of the SentencePiece model at `path`.

    Raises:
        UserError: if the file is none, or of a kind whose ids transformers would not give.
    """
    from transformers import PreTrainedTokenizerFast

    theirs = sentencepiece.SentencePieceProcessor()
    theirs.LoadFromSerializedProto(path.read_bytes())
    proto = _proto(theirs)
    named = {"bos_token": theirs.bos_id(), "eos_token": theirs.eos_id(), "pad_token": theirs.pad_id()}
    ours = PreTrainedTokenizerFast(
        tokenizer_object=_translated(proto, path),
        unk_token=proto.pieces[theirs.unk_id()].piece,
        clean_up_tokenization_spaces=False,
        **{name: proto.pieces[i].piece for name, i in named.items() if i >= 0},
    )
    _prove(ours, theirs, [piece.piece for piece in proto.pieces if piece.type == _USER], path)
    return ours


def _proto(model: sentencepiece.SentencePieceProcessor):
    """All of the file; the processor tells neither a piece's type nor the normaliser."""
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(model.serialized_model_proto())


def _translated(proto, path: Path) -> Tokenizer:
    tokenizer = Tokenizer(_model(proto, path))
    user = [piece.piece for piece in proto.pieces if piece.type == _USER]
    tokenizer.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in user])
    spec = proto.normalizer_spec
    steps = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    prefix = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(back + prefix)
    return tokenizer


def _model(proto, path: Path) -> models.Model:
    from transformers.convert_slow_tokenizer import generate_merges

    spec = proto.trainer_spec
    scores = {piece.piece: piece.score for piece in proto.pieces}
    if spec.model_type == _UNIGRAM:
        return models.Unigram(list(scores.items()), unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)
    if spec.model_type != _BPE:
        raise UserError(
            f"--tokenizer {path} is a SentencePiece model of words or characters: give BPE or unigram"
        )
    vocab = {piece: i for i, piece in enumerate(scores)}
    whole = {piece.piece for piece in proto.pieces if piece.type != _NORMAL}  # nothing is merged into them
    merges = generate_merges(vocab, scores, whole)
    return models.BPE(
        vocab, merges, unk_token=spec.unk_piece, byte_fallback=spec.byte_fallback, fuse_unk=True
    )


def _prove(ours, theirs: sentencepiece.SentencePieceProcessor, user: list[str], path: Path) -> None:
    """Refuse a translation that encodes or decodes the probe, or a symbol of the user's, otherwise."""
    symbols = [text for piece in user for text in (piece, f"a{piece}b", f"a {piece} {piece}")]
    for text in (*_PROBE, *symbols):
        ids = theirs.EncodeAsIds(text)
        same = ours(text, add_special_tokens=False).input_ids == ids
        # an unknown one is written as " ⁇ " by SentencePiece alone
        if not same or (theirs.unk_id() not in ids and ours.decode(ids) != theirs.DecodeIds(ids)):
            raise UserError(
                f"--tokenizer {path}: transformers would tokenize {text!r} otherwise than this SentencePiece "
                "model: give a Hugging Face folder of it that gives its ids"
            )
