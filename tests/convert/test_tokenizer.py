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
