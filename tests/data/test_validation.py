"""Bad data is refused by name, before anything is built."""

import shutil

import numpy
import pytest
from tests_data import END, VOCAB, write_documents

from megatron_clsa.data.validation import validate_data, validate_data_arguments
from megatron_clsa.errors import UserError


@pytest.fixture
def prefix(tmp_path):
    return write_documents(tmp_path / "good", [[i, i + 1, END] for i in range(10)])


def _refuses(match: str, *paths, tokenizer=None):
    with pytest.raises(UserError, match=match):
        validate_data(list(paths), tokenizer)


def test_sound_data_passes(prefix, tokenizer):
    validate_data([prefix], tokenizer)


def test_missing_files_are_named(tmp_path, prefix):
    _refuses("no dataset at .*nothing: .*nothing.idx is missing", tmp_path / "nothing")
    _refuses("leave .bin or .idx out", prefix + ".bin")
    (tmp_path / "good.bin").unlink()
    _refuses("good.bin is missing", prefix)


@pytest.mark.parametrize("keep", [0, 9, 33, 34, 100, -1])
def test_a_truncated_index_is_refused(tmp_path, prefix, keep):
    index = tmp_path / "good.idx"
    index.write_bytes(index.read_bytes()[:keep])
    _refuses("good.idx (is not the index|has .* bytes, its head says)", prefix)


@pytest.mark.parametrize("change", [lambda raw: raw[:-1], lambda raw: raw + b"\0\0", lambda raw: b""])
def test_a_bin_of_another_length_is_refused(tmp_path, prefix, change):
    binary = tmp_path / "good.bin"
    binary.write_bytes(change(binary.read_bytes()))
    _refuses("good.bin has .* bytes, its index describes 60", prefix)


def test_a_pair_of_two_datasets_is_refused(tmp_path, prefix):
    write_documents(tmp_path / "other", [[1, END]])
    shutil.copy(tmp_path / "other.idx", tmp_path / "good.idx")
    _refuses("of another index", prefix)


def test_data_without_documents_is_refused(tmp_path):
    _refuses("holds no document", write_documents(tmp_path / "empty", []))


def test_ids_outside_the_vocabulary_are_refused(tmp_path, tokenizer):
    wide = write_documents(tmp_path / "wide", [[1, END], [VOCAB + 5, END]])
    _refuses(rf"document 1 has token id {VOCAB + 5}, .* has {VOCAB} ids", wide, tokenizer=tokenizer)


def test_documents_without_an_end_are_told(tmp_path, tokenizer):
    open_ended = write_documents(tmp_path / "open", [[1, 2, 3]] * 5)
    with pytest.warns(UserWarning, match="5 of 5 sampled documents do not end with token 99"):
        validate_data([open_ended], tokenizer)


@pytest.mark.parametrize("split", ["99,1,0", "50,49,1"])
def test_a_part_without_documents_is_refused_not_looped_over(prefix, data_arguments, split):
    with pytest.raises(UserError, match=f"--split {split} leaves no document of .* for (valid|test)"):
        validate_data_arguments(data_arguments(prefix, split=split))


@pytest.mark.parametrize("split", ["", "0,0,0", "1,2,3,4", "half"])
def test_a_split_that_is_none_is_refused(prefix, data_arguments, split):
    with pytest.raises(UserError, match="--split"):
        validate_data_arguments(data_arguments(prefix, split=split))


def test_weights_must_be_usable(prefix, data_arguments):
    for flags in (["0", prefix], ["1", "-1"], ["-1", prefix, "2", prefix], ["1", prefix, prefix, prefix]):
        with pytest.raises(UserError, match="weight"):
            validate_data_arguments(data_arguments(*flags))


def test_no_data_at_all_is_named(data_arguments):
    with pytest.raises(UserError, match=r"--data-path PREFIX .*or --mock-data"):
        validate_data_arguments(data_arguments())
    validate_data_arguments(data_arguments(mock_data=True))


def test_evaluation_must_use_the_microbatch_that_tensor_ranks_expect(prefix, data_arguments):
    flags = data_arguments(prefix, tensor_model_parallel_size=2, micro_batch_size=2, eval_micro_batch_size=1)
    with pytest.raises(UserError, match="--eval-micro-batch-size 1"):
        validate_data_arguments(flags)


def test_damage_inside_the_files_shows_in_the_ids(tmp_path, prefix, tokenizer):
    binary = tmp_path / "good.bin"
    tokens = numpy.fromfile(binary, dtype=numpy.uint16)
    tokens[3] ^= 1 << 14
    tokens.tofile(binary)
    _refuses("token id", prefix, tokenizer=tokenizer)
