"""Checks of the data that a run is given, made before any process group or dataset exists.

Owns blends, splits and token ids. Whether one pair of files is sound is indexed.py's; Megatron's own
builders would find the same faults late, as an assertion, or never: an empty split loops without end.
"""

import warnings

import numpy
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_clsa.data.indexed import IndexHead, check_pair, read_manifest
from megatron_clsa.data.tokenizer import tokenizer_digest
from megatron_clsa.errors import UserError

Blend = tuple[list[str], list[float] | None]
_SAMPLED_DOCUMENTS = 64
_SAMPLED_TOKENS = 4096


def blends_of(args) -> tuple[Blend | None, list[Blend | None] | None]:
    """(blend, blend per split) of Megatron's data flags: prefixes with weights; both None on mock data."""
    if args.mock_data:
        return None, None
    try:
        blend, per_split = get_blend_and_blend_per_split(args)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--data-args-path or --per-split-data-args-path cannot be read: {error}") from None
    if blend is None and not any(per_split or []):
        raise UserError("no data: give --data-path PREFIX (or WEIGHT PREFIX ...), or --mock-data")
    for prefixes, weights in filter(None, [blend, *(per_split or [])]):
        _check_weights(prefixes, weights)
    return blend, per_split


def _check_weights(prefixes: list[str], weights: list[float] | None) -> None:
    """Megatron takes a weight without a prefix for a prefix."""
    stray = [prefix for prefix in prefixes if prefix.replace(".", "", 1).lstrip("-").isdigit()]
    if stray:
        raise UserError(
            f"data path {stray[0]} looks like a weight; give one weight before each prefix, or none"
        )
    if weights is not None and (min(weights) < 0 or sum(weights) == 0):
        raise UserError(f"data weights {weights} must not be negative, nor all zero")


def prefixes_of(args) -> list[str]:
    """Every dataset prefix that the data flags name, in order, each once."""
    blend, per_split = blends_of(args)
    blends = filter(None, [blend, *(per_split or [])])
    return list(dict.fromkeys(prefix for prefixes, _ in blends for prefix in prefixes))


def validate_data(paths: list[str], tokenizer=None) -> None:
    """Raise `UserError` unless every prefix in `paths` is sound and its token ids are `tokenizer`'s.

    Needs no process group and reads kilobytes a prefix. Checksums: indexed.verify_checksums.
    """
    for prefix in paths:
        head = check_pair(prefix)
        if tokenizer is not None:
            _check_manifest(prefix, tokenizer)
            _check_tokens(prefix, head, tokenizer)


def validate_data_arguments(args, tokenizer=None) -> None:
    """`validate_data` for Megatron's parsed arguments, and their weights and split as well."""
    evaluated = args.eval_micro_batch_size
    if args.tensor_model_parallel_size > 1 and evaluated not in (None, args.micro_batch_size):
        raise UserError(
            f"--eval-micro-batch-size {evaluated} must equal --micro-batch-size {args.micro_batch_size} with "
            "tensor parallelism: ranks that receive a batch allocate it before they know its kind"
        )
    blend, _ = blends_of(args)
    validate_data(prefixes_of(args), tokenizer)
    for prefix in blend[0] if blend is not None else []:
        _check_split(prefix, check_pair(prefix), args.split)


def _check_manifest(prefix: str, tokenizer) -> None:
    manifest = read_manifest(prefix)
    if manifest is None:
        return
    made_with, given = manifest["tokenizer"], tokenizer_digest(tokenizer.path)
    if given is not None and made_with["sha256"] != given:
        raise UserError(
            f"{prefix} was made with another tokenizer ({made_with['model']}) than "
            f"--tokenizer-model {tokenizer.path}"
        )


def _check_tokens(prefix: str, head: IndexHead, tokenizer) -> None:
    """Look at documents spread over the data: ids within the vocabulary, and a last token that ends them."""
    data = IndexedDataset(str(prefix))
    without_end = 0
    chosen = numpy.unique(numpy.linspace(0, head.sequences - 1, _SAMPLED_DOCUMENTS).astype(int))
    for document in chosen.tolist():
        length = int(data.sequence_lengths[document])
        tokens = data.get(document, length=min(length, _SAMPLED_TOKENS))
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < tokenizer.vocab_size:
            raise UserError(
                f"{prefix}: document {document} has token id {tokens.max()}, --tokenizer-model "
                f"{tokenizer.path} has {tokenizer.vocab_size} ids; give the one that the data was made with"
            )
        without_end += length == 0 or int(data.get(document, offset=length - 1)[0]) != tokenizer.eod
    if without_end:
        warnings.warn(
            f"{prefix}: {without_end} of {chosen.size} sampled documents do not end with token "
            f"{tokenizer.eod} and will see their neighbours; preprocess with --append-eod to keep them apart",
            stacklevel=2,
        )


def _check_split(prefix: str, head: IndexHead, split: str) -> None:
    """Every part that --split names must get a document: Megatron loops for ever over an empty part."""
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= len(Split) or min(shares) < 0 or sum(shares) == 0:
        raise UserError(f"--split '{split}': give up to three shares for train,valid,test, such as 99,1,0")
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    for part in Split:
        edges = matrix[part.value] or (0, 1)
        first, end = (round(edge * float(head.sequences)) for edge in edges)
        if end <= first:
            raise UserError(
                f"--split {split} leaves no document of {prefix} ({head.sequences} in all) for {part.name}; "
                "set that part to 0, enlarge it, or give data with more documents"
            )
