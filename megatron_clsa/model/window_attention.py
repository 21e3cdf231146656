"""Core attention of the self-decoder: a causal sliding window, cut at document starts.

Owns the layout (context-parallel chunks and their halo), not the attention itself, which is the kernels'.
`attention_mask` carries the visible rows as `[2, b, s/cp]` int32 (start, end): a tensor, so that
megatron-core's selective recompute can save it.
"""

from functools import lru_cache

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_clsa.kernels import dispatch
from megatron_clsa.kernels.rows import RowRange
from megatron_clsa.parallel.context import chunks_with_halo, gather_sequence, local_positions


@lru_cache(maxsize=2)
def _windowed_rows(attention_mask: Tensor, window: int) -> RowRange:
    """One object for all layers of a microbatch (they pass the same tensor), so that what the kernels derive
    from it is derived once.
    """
    return RowRange(*attention_mask).windowed(window)


class WindowAttention(MegatronModule):
    """`softmax(Q K^T / sqrt(d)) V` over the last `sliding_window` positions of the query's document."""

    def __init__(
        self,
        config,
        layer_number,
        attn_mask_type,
        attention_type,
        attention_dropout=None,
        softmax_scale=None,
        cp_comm_type=None,
        pg_collection=None,
        **unused,
    ):
        super().__init__(config)
        self.cp_group = pg_collection.cp
        self.window = config.sliding_window
        self.scale = softmax_scale or config.kv_channels**-0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        attn_mask_type=None,
        attention_bias=None,
        packed_seq_params=None,
    ) -> Tensor:
        """Query `[s/cp, b, h/tp, d]`, key and value `[s/cp, b, g/tp, d]` -> `[s/cp, b, h/tp * d]`."""
        rows = _windowed_rows(attention_mask, self.window)
        if self.cp_group.size() == 1:
            window = min(self.window, query.size(0))  # memory goes with it, and there are no more rows
            output = self._attend(*(x.transpose(0, 1) for x in (query, key, value)), rows, window)
        elif self.window - 1 <= query.size(0) // 2:
            output = self._attend_chunks(query, key, value, rows)
        else:
            output = self._attend_gathered(query, key, value, rows)
        return output.transpose(0, 1).flatten(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, rows: RowRange, window: int) -> Tensor:
        return dispatch.window_attention(query, key, value, rows, window, self.scale)

    def _attend_chunks(self, query: Tensor, key: Tensor, value: Tensor, rows: RowRange) -> Tensor:
        """Each of the two chunks sees itself and the `window - 1` rows before it: the only rows exchanged."""
        halo, batch, head_dim = self.window - 1, query.size(1), query.size(-1)
        kv = chunks_with_halo(torch.cat([key, value], dim=2).flatten(2), halo, self.cp_group)
        kv = kv.unflatten(-1, (-1, head_dim)).transpose(1, 2).flatten(0, 1)  # [2 b, halo + c, 2 g, d]
        chunked = query.unflatten(0, (2, -1)).transpose(1, 2).flatten(0, 1)
        output = self._attend(chunked, *kv.chunk(2, dim=2), self._chunk_rows(rows, halo), self.window)
        return output.unflatten(0, (2, batch)).transpose(0, 1).flatten(1, 2)

    def _chunk_rows(self, rows: RowRange, halo: int) -> RowRange:
        """`[b, s/cp]` global rows to `[2 b, c]` rows of each chunk's own keys."""
        starts = local_positions(rows.end.size(1), self.cp_group, rows.end.device).view(2, -1)[:, :1]
        first_key = (starts - halo).to(torch.int32)[:, None]  # [2, 1, 1]
        start, end = (
            (x.unflatten(1, (2, -1)).transpose(0, 1) - first_key).flatten(0, 1)
            for x in (rows.start, rows.end)
        )
        return RowRange(start, end)

    def _attend_gathered(self, query: Tensor, key: Tensor, value: Tensor, rows: RowRange) -> Tensor:
        """A window longer than a chunk reaches over several ranks: gather, the sequence is short then."""
        key, value = gather_sequence(torch.cat([key, value], dim=2), self.cp_group).chunk(2, dim=2)
        output, _ = dispatch.dense_attention(
            *(x.transpose(0, 1) for x in (query, key, value)), rows, self.scale
        )
        return output
