"""Dense and windowed attention on GPUs: torch's variable-length FlashAttention, given what `RowRange` says.

Owns the translation of visible rows into segments (a run of queries and the keys it starts from), found once
for each `RowRange`; the attention is `torch.nn.attention.varlen`. Axes: b batch, sq queries, sk keys, h query
heads, g KV heads, d head dim, n segments.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from megatron_clsa.kernels.rows import RowRange

_MEMO = "_flash_segments"


@dataclass(frozen=True, eq=False)
class Segments:
    """Runs of queries with consecutive positions in one document; each run's keys are contiguous.

    Attributes:
        query_offsets: `[n + 1]` int32 into the `b * sq` queries.
        key_offsets: `[n + 1]` int32 into the packed keys.
        packing: `[packed keys]` int64 rows of the `b * sk` keys, None if these are packed already. Shards of
            context parallelism need it: a document's first keys serve both chunks of a rank.
        longest_query, longest_key: in rows.
    """

    query_offsets: Tensor
    key_offsets: Tensor
    packing: Tensor | None
    longest_query: int
    longest_key: int


def supported(query: Tensor, rows: RowRange, num_keys: int) -> bool:
    """Whether FlashAttention serves these tensors: half precision on a GPU, and no row without a key."""
    fits = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256
    return fits and segments(rows, num_keys) is not None


def segments(rows: RowRange, num_keys: int) -> Segments | None:
    """The runs of `rows`, remembered with it; None if a row sees no key, which FlashAttention cannot say."""
    if _MEMO not in rows.__dict__:
        rows.__dict__[_MEMO] = _find_segments(rows, num_keys)
    return rows.__dict__[_MEMO]


def _find_segments(rows: RowRange, num_keys: int) -> Segments | None:
    start, end = rows.start, rows.end
    b, sq = end.shape
    begins = torch.ones_like(end, dtype=torch.bool)
    # A document's first row sees itself alone; a jump in position is the other chunk of a shard.
    begins[:, 1:] = (start[:, 1:] == end[:, 1:]) | (end[:, 1:] != end[:, :-1] + 1)
    first = begins.flatten().nonzero().flatten()
    stop = torch.cat([first[1:], first.new_tensor([b * sq])])
    offset = first // sq * num_keys
    key_start = start.flatten()[first] + offset
    lengths = end.flatten()[stop - 1] + offset + 1 - key_start
    key_offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    packed = (key_start == key_offsets[:-1]).all() & (key_offsets[-1] == b * num_keys)
    figures = [(end < start).any(), packed, key_offsets[-1], (stop - first).max(), lengths.max()]
    empty, packed, total, longest_query, longest_key = torch.stack([x.long() for x in figures]).tolist()
    if empty:
        return None
    packing = None
    if not packed:
        shift = (key_start - key_offsets[:-1]).repeat_interleave(lengths, output_size=total)
        packing = torch.arange(total, device=end.device) + shift
    query_offsets = torch.nn.functional.pad(stop, (1, 0))
    return Segments(query_offsets.int(), key_offsets.int(), packing, longest_query, longest_key)


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, rows: RowRange, scale: float, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """`(out [b, sq, h, d], lse [b, h, sq])` over visible keys; with `window`, the last `window` of them."""
    (b, sq, h, _), (_, sk, _, _) = query.shape, key.shape
    runs = segments(rows, sk)
    key, value = key.flatten(0, 1), value.flatten(0, 1)
    if runs.packing is not None:
        key, value = key[runs.packing], value[runs.packing]
    out, lse = varlen_attn(
        query.flatten(0, 1),
        key,
        value,
        runs.query_offsets,
        runs.key_offsets,
        runs.longest_query,
        runs.longest_key,
        return_aux=AuxRequest(lse=True),
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
    )
    return out.view(query.shape), lse.view(h, b, sq).transpose(0, 1)
