"""Dense causal attention of whole sequences on Hopper: cuDNN, through the operator behind torch's SDPA.

Owns the conditions under which cuDNN serves, and the call. It takes no packed documents and no shard of
context parallelism; `flash.py` serves those. As there, the LSE carries no gradient.
Axes: b batch, s sequence, h query heads, g KV heads, d head dim.
"""

import torch
from torch import Tensor

from megatron_clsa.kernels.device import on_hopper
from megatron_clsa.kernels.flash import segments
from megatron_clsa.kernels.rows import RowRange

ROWS_MULTIPLE = 128  # at s % 128 == 64 cuDNN's backward pass gives NaN for rows with an LSE below -88
LARGEST_HEAD_DIM = 128


def plain_causal(rows: RowRange, num_queries: int, num_keys: int) -> bool:
    """Whether query t of every batch entry sees the keys 0..t, by the segments remembered with `rows`.

    One segment a batch entry, all keys of all entries in order, the longest with all keys: all are alike.
    """
    runs = segments(rows, num_keys)
    return (
        runs is not None
        and runs.packing is None
        and runs.query_offsets.numel() - 1 == rows.end.shape[0]
        and num_queries == num_keys == runs.longest_key
    )


def supported(query: Tensor, key: Tensor, rows: RowRange) -> bool:
    """Whether cuDNN serves; where torch is asked for deterministic algorithms, only `flash.py` obeys."""
    return (
        on_hopper(query)
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= LARGEST_HEAD_DIM
        and query.shape[1] % ROWS_MULTIPLE == 0
        and not torch.are_deterministic_algorithms_enabled()
        and torch.backends.cudnn.is_available()
        and plain_causal(rows, query.shape[1], key.shape[1])
    )


def cudnn_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`(out [b, s, h, d], lse [b, h, s])` of plain causal attention; key and value `[b, s, g, d]`."""
    b, s, h, _ = query.shape
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *heads_first, None, True, 0.0, True, False, scale=scale
    )
    return out.transpose(1, 2), lse.reshape(b, h, s)
