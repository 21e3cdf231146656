"""The tokenizer and the flags of the data tests."""

from types import SimpleNamespace

import pytest
from megatron.training.config import TokenizerConfig
from tests_data import VOCAB

from megatron_clsa.data.tokenizer import load_tokenizer


@pytest.fixture
def tokenizer():
    """Ids stand for themselves; the last one ends a document."""
    return load_tokenizer(
        TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=VOCAB, pad_vocab_size=False)
    )


@pytest.fixture
def data_arguments():
    """A function that makes the flags which the data package reads."""

    def make(*data_path: str, **others) -> SimpleNamespace:
        defaults = dict(
            data_path=list(data_path) or None,
            data_args_path=None,
            train_data_path=None,
            valid_data_path=None,
            test_data_path=None,
            per_split_data_args_path=None,
            mock_data=False,
            split="100",
            seed=1234,
            seq_length=16,
            multiple_validation_sets=False,
            full_validation=False,
            num_dataset_builder_threads=1,
            data_cache_path=None,
            mmap_bin_files=True,
            tensor_model_parallel_size=1,
            micro_batch_size=1,
            eval_micro_batch_size=None,
        )
        return SimpleNamespace(**(defaults | others))

    return make
