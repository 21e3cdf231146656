"""Small indexed data, written by Megatron's own builder."""

from pathlib import Path

import numpy
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

VOCAB = 100
END = VOCAB - 1


def write_documents(prefix: Path, documents: list[list[int]]) -> str:
    """One sequence a document, as Megatron's preprocessing writes them."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for document in documents:
        builder.add_item(torch.tensor(document))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return str(prefix)
