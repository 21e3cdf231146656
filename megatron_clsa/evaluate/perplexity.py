"""Loss by position in the sequence: a fault of window or index shows as a step at its size.

Owns cutting texts into sequences and the buckets. Logits are made for a slice of rows at a time.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from megatron_clsa.errors import UserError
from megatron_clsa.evaluate.load import Subject

ROWS_AT_ONCE = 512  # rows whose logits exist at a time


def sequences(subject: Subject, texts: list[str], length: int, count: int) -> Tensor:
    """`[n <= count, length + 1]` token ids: the documents in order, joined by the end token, cut evenly.

    Raises:
        UserError: if the texts do not fill one sequence.
    """
    end, ids = subject.tokenizer.eos_token_id, []
    for text in texts:
        ids += subject.encode(text) + ([] if end is None else [end])
        if len(ids) >= count * (length + 1):
            break
    if len(ids) <= length:
        raise UserError(
            f"--text holds {len(ids)} tokens, --length {length} needs {length + 1}: give more text or less"
        )
    whole = len(ids) // (length + 1)
    return torch.tensor(ids[: whole * (length + 1)]).view(whole, length + 1)[:count]


@torch.no_grad()
def token_losses(subject: Subject, ids: Tensor) -> Tensor:
    """`[length]` fp32 loss of every next token of one sequence `[length + 1]`."""
    model = subject.model
    ids = ids.to(model.device)
    hidden = model.base_model(input_ids=ids[None, :-1], use_cache=False).last_hidden_state[0]
    head, losses = model.get_output_embeddings(), []
    for rows, labels in zip(hidden.split(ROWS_AT_ONCE), ids[1:].split(ROWS_AT_ONCE), strict=True):
        losses.append(torch.nn.functional.cross_entropy(head(rows).float(), labels, reduction="none"))
    return torch.cat(losses).cpu()


@dataclass(frozen=True)
class Bucket:
    """Positions first..last (1-based: how many tokens the model has seen) with their mean loss."""

    first: int
    last: int
    loss: float
    tokens: int


def bucket_edges(length: int, special: list[int]) -> list[int]:
    """First positions of the buckets: powers of two, and the position after each special size.

    A power that is a special size, or the length, would make a bucket of one position: noise.
    """
    powers = [2**i for i in range(length.bit_length()) if i == 0 or 2**i not in (length, *special)]
    return sorted({edge for edge in [*powers, *(size + 1 for size in special)] if edge <= length})


def by_position(losses: Tensor, special: list[int]) -> list[Bucket]:
    """losses `[n, length]` -> means over buckets of positions."""
    length = losses.shape[1]
    edges = [*bucket_edges(length, special), length + 1]
    buckets = []
    for first, after in pairwise(edges):
        part = losses[:, first - 1 : after - 1]
        buckets.append(Bucket(first, after - 1, part.double().mean().item(), part.numel()))
    return buckets


def measure(subject: Subject, texts: list[str], length: int, count: int) -> dict:
    """The perplexity section of the report."""
    ids = sequences(subject, texts, length, count)
    losses = torch.stack([token_losses(subject, row) for row in ids])
    config = subject.model.config
    special = [config.sliding_window, config.index_topk] if subject.is_clsa else []
    mean = losses.double().mean().item()
    return {
        "sequences": len(ids),
        "length": length,
        "loss": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "by_position": [vars(bucket) for bucket in by_position(losses, special)],
    }
