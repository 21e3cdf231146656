"""A Hugging Face tokenizer folder works from text to batches, and one without an end token is refused."""

import json

import pytest
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_clsa.data.preprocess import Job, preprocess
from megatron_clsa.data.provider import dataset_config
from megatron_clsa.data.tokenizer import load_tokenizer_of
from megatron_clsa.errors import UserError

TEXTS = [f"line {i}\n\tof größe {i * i}" for i in range(50)]


def _folder(path, **special) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    return str(path)


def test_text_to_batches_without_a_pad_token(tmp_path, data_arguments):
    folder = _folder(tmp_path / "hf", eos_token="<end>")
    source, prefix = tmp_path / "in.jsonl", str(tmp_path / "out")
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    preprocess(Job(prefix, "HuggingFaceTokenizer", folder), [str(source)], 1)
    tokenizer = load_tokenizer_of("HuggingFaceTokenizer", folder)
    assert tokenizer.pad is None
    config = dataset_config(data_arguments(prefix), tokenizer)
    train, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [20, 0, 0], lambda: True, config).build()
    for i in range(20):
        assert (train[i]["loss_mask"] == (train[i]["tokens"] != tokenizer.eod)).all()
    ids = train.dataset[3].tolist()
    assert tokenizer.detokenize(ids[:-1]) == TEXTS[3] and ids[-1] == tokenizer.eod


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no end-of-document token; set its eos_token"):
        load_tokenizer_of("HuggingFaceTokenizer", _folder(tmp_path / "hf"))
