"""A SentencePiece tokenizer, translated for the exported folder, gives the ids that training saw.

Owns no folder: which tokenizer a tool takes is in test_to_hf.py and test_from_hf.py.
"""

import sysconfig
from pathlib import Path

import pytest
import sentencepiece
from checkpoints import make
from tools_here import to_hf

from megatron_clsa.convert.tokenizer import count_tokens, write_tokenizer
from megatron_clsa.data.tokenizer import train_sentencepiece
from megatron_clsa.errors import UserError

TEXT = [path.read_text() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-d]*.py"))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece([line for text in TEXT[:10] for line in text.splitlines()], path, vocab_size=600)
    return path


def test_the_translation_gives_the_same_ids_and_text(trained, tmp_path):
    from transformers import AutoTokenizer

    write_tokenizer(trained, tmp_path, 600)
    here, there = sentencepiece.SentencePieceProcessor(), AutoTokenizer.from_pretrained(tmp_path)
    here.LoadFromSerializedProto(trained.read_bytes())
    for text in [*TEXT, "naïve — 東京 🙂\t\t  two  spaces\n\n"]:
        ids = here.EncodeAsIds(text)
        assert there(text, add_special_tokens=False).input_ids == ids
        assert there.decode(ids) == here.DecodeIds(ids)


ELSEWHERE = {  # what the trainer's own defaults and other projects' models do otherwise
    "defaults": {},
    "llama": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "unigram": {"model_type": "unigram"},
    "symbols": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<|im_start|>", "self"],
    },
}
REFUSED = {
    "symbols after a prefix": {"user_defined_symbols": ["<|im_start|>"]},
    "spaces after words": {"treat_whitespace_as_suffix": True},
    "words": {"model_type": "word", "hard_vocab_limit": False},
}
LINES = [line for text in TEXT[:4] for line in text.splitlines()]


def _elsewhere(folder: Path, changes: dict) -> Path:
    fields = {"model_type": "bpe", "vocab_size": 500, "byte_fallback": True, "minloglevel": 2} | changes
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_prefix=str(folder / "t"), **fields
    )
    return folder / "t.model"


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_a_model_trained_elsewhere_gives_its_ids(tmp_path, kind):
    from transformers import AutoTokenizer

    path = _elsewhere(tmp_path, ELSEWHERE[kind])
    write_tokenizer(path, tmp_path, 500)
    here, there = sentencepiece.SentencePieceProcessor(), AutoTokenizer.from_pretrained(tmp_path)
    here.LoadFromSerializedProto(path.read_bytes())
    for text in [*LINES, "<|im_start|>user  <|im_start|>\n"]:
        if "<|im_start|>" not in text or kind == "symbols":
            assert there(text, add_special_tokens=False).input_ids == here.EncodeAsIds(text)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_transformers_would_read_otherwise_is_refused(tmp_path, kind):
    path = _elsewhere(tmp_path, REFUSED[kind])
    (tmp_path / "hf").mkdir()
    with pytest.raises(UserError, match=rf"--tokenizer {path}.* give "):
        write_tokenizer(path, tmp_path / "hf", 500)
    assert not list((tmp_path / "hf").iterdir())


def test_both_count_the_same_tokens(trained, tmp_path):
    write_tokenizer(trained, tmp_path, 600)
    assert count_tokens(trained) == count_tokens(tmp_path) == 600


def test_an_export_has_the_tokenizer_and_a_generation_config_that_stops_at_its_end(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"</s>": 0, "<s>": 1, "<pad>": 2, "a": 3}, unk_token="a"))
    special = {"eos_token": "</s>", "bos_token": "<s>", "pad_token": "<pad>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(tmp_path / "tokenizer")
    result = to_hf(make(tmp_path / "checkpoint"), tmp_path / "hf", "--tokenizer", tmp_path / "tokenizer")
    assert result.returncode == 0, result.stderr[-3000:]
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert loaded.chat_template == fast.chat_template and loaded.get_vocab() == fast.get_vocab()
    generation = GenerationConfig.from_pretrained(tmp_path / "hf")
    assert (generation.eos_token_id, generation.bos_token_id, generation.pad_token_id) == (0, 1, 2)
