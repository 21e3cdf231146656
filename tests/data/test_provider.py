"""What the model is fed: documents kept apart, weights, splits, and no stale index."""

import itertools

import numpy
import pytest
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset
from tests_data import END, write_documents

from megatron_clsa.data import provider
from megatron_clsa.data.provider import dataset_config
from megatron_clsa.errors import UserError


def _build(arguments, tokenizer, sizes=(40, 0, 0)):
    config = dataset_config(arguments, tokenizer)
    return BlendedMegatronDatasetBuilder(GPTDataset, list(sizes), lambda: True, config).build()


def _documents(count: int, first: int = 0) -> list[list[int]]:
    """Documents of 3 to 9 tokens; document i repeats token `first + i`."""
    return [[first + i] * (2 + i % 7) + [END] for i in range(count)]


def test_positions_restart_and_the_loss_skips_exactly_the_boundaries(tmp_path, tokenizer, data_arguments):
    prefix = write_documents(tmp_path / "a", _documents(30))
    train, _, _ = _build(data_arguments(prefix), tokenizer)
    for sample in itertools.islice(train, 20):
        tokens, labels = sample["tokens"].numpy(), sample["labels"].numpy()
        ends = tokens == END
        starts = numpy.concatenate([[True], ends[:-1]])
        start_of = numpy.maximum.accumulate(numpy.where(starts, numpy.arange(16), 0))
        numpy.testing.assert_array_equal(sample["position_ids"], numpy.arange(16) - start_of)
        numpy.testing.assert_array_equal(sample["loss_mask"], 1.0 - ends)
        assert (labels[~ends] == END).any()  # ending a document is learned
        inside = ~ends & (labels != END)
        numpy.testing.assert_array_equal(tokens[inside], labels[inside])


def test_no_mask_of_the_whole_sequence_is_made(tmp_path, tokenizer, data_arguments):
    prefix = write_documents(tmp_path / "a", _documents(30))
    train, _, _ = _build(data_arguments(prefix), tokenizer)
    assert set(train[0]) == {"tokens", "labels", "loss_mask", "position_ids"}


@pytest.mark.parametrize("weights", [(0.75, 0.25), (3, 1), (1, 9)])
def test_blend_follows_the_weights(tmp_path, tokenizer, data_arguments, weights):
    prefixes = [write_documents(tmp_path / n, [[t] * 16 + [END]] * 40) for n, t in (("a", 1), ("b", 2))]
    flags = [str(item) for pair in zip(weights, prefixes, strict=True) for item in pair]
    train, _, _ = _build(data_arguments(*flags), tokenizer, sizes=(100, 0, 0))
    from_first = sum((train[i]["tokens"] == 1).sum() > (train[i]["tokens"] == 2).sum() for i in range(100))
    assert abs(from_first / 100 - weights[0] / sum(weights)) <= 0.02


def test_split_gives_disjoint_documents_in_order(tmp_path, tokenizer, data_arguments):
    prefix = write_documents(tmp_path / "a", [[i] * 20 + [END] for i in range(50)])
    parts = _build(data_arguments(prefix, split="80,10,10"), tokenizer, sizes=(50, 5, 5))
    seen = [{int(t) for i in range(len(p)) for t in p[i]["tokens"]} - {END} for p in parts]
    assert seen == [set(range(40)), set(range(40, 45)), set(range(45, 50))]


def test_each_split_may_name_its_own_data(tmp_path, tokenizer, data_arguments):
    prefixes = [
        write_documents(tmp_path / n, [[t] * 20 + [END]] * 9) for n, t in (("a", 1), ("b", 2), ("c", 3))
    ]
    train, valid, test = ([prefix] for prefix in prefixes)
    flags = data_arguments(train_data_path=train, valid_data_path=valid, test_data_path=test, split=None)
    for part, token in zip(_build(flags, tokenizer, sizes=(8, 4, 4)), (1, 2, 3), strict=True):
        assert {int(t) for t in part[0]["tokens"]} <= {token, END}


def test_data_made_again_under_one_name_gets_new_indices(tmp_path, tokenizer, data_arguments):
    prefix = write_documents(tmp_path / "a", _documents(30))
    _build(data_arguments(prefix), tokenizer)
    write_documents(tmp_path / "a", _documents(5, first=50))
    train, _, _ = _build(data_arguments(prefix), tokenizer)
    assert {int(t) for i in range(20) for t in train[i]["tokens"]} <= {50, 51, 52, 53, 54, END}


def test_indices_that_cannot_be_written_name_the_flag(tmp_path, tokenizer, data_arguments, monkeypatch):
    """Data that all may read and few may write is usual on a cluster; Megatron names none of our flags."""
    prefix = write_documents(tmp_path / "a", _documents(30))
    arguments = data_arguments(prefix, data_cache_path="/dev/null/cache")
    monkeypatch.setattr(provider, "get_args", lambda: arguments)
    monkeypatch.setattr(provider, "get_tokenizer", lambda: tokenizer)
    monkeypatch.setattr(provider.mpu, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(provider, "is_first_or_last_pipeline_stage", lambda stage: True)
    with pytest.raises(UserError, match=r"--data-cache-path /dev/null/cache.*: Not a directory"):
        provider.train_valid_test_datasets_provider([40, 0, 0])
