"""The one memory: K, V and the index, made from the self-decoder's output once a microbatch.

Owns how the memory is projected, gathered and indexed; not how it crosses a pipeline link
(`parallel/pipeline.py`) nor how it is read (`cross_attention.py`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor

from megatron_clsa.kernels import dispatch
from megatron_clsa.kernels.rows import RowRange
from megatron_clsa.model.forward_mode import ForwardMode
from megatron_clsa.model.indexer import Indexer
from megatron_clsa.parallel.context import gather_rows, gather_sequence, split_rows
from megatron_clsa.parallel.pipeline import MemoryShard


@dataclass(frozen=True)
class SharedMemory:
    """What every cross-decoder layer of a stage reads (kernels' layout, keys in global order).

    Attributes:
        key, value: `[b, s, g/tp, d]`.
        q_idx: `[b, s/cp, d_idx]`, k_idx: `[b, s, d_idx]`, or None.
        index: `[b, s/cp, k]` int32, ascending, -1 filled, or None. The same on every TP rank.
        rows: which positions each local query may see.
        loss_rows: `[b, s/cp]` bool, rows that the losses count.
        plan: what the kernels derived from the index, or None.
    """

    key: Tensor
    value: Tensor
    q_idx: Tensor | None
    k_idx: Tensor | None
    index: Tensor | None
    rows: RowRange
    loss_rows: Tensor
    plan: Any = None


@dataclass
class MemorySubmodules:
    """Specs of the memory's parts."""

    norm: ModuleSpec | type
    linear_kv: ModuleSpec | type
    k_layernorm: ModuleSpec | type


class MemoryProjection(MegatronModule):
    """`x = RMSNorm(H)`, `K = x Wk`, `V = x Wv` (no position encoding), and the indexer on `x`."""

    def __init__(self, config, submodules: MemorySubmodules, pg_collection):
        super().__init__(config)
        self.tp_group = pg_collection.tp
        self.head_dim = config.kv_channels
        self.norm = build_module(
            submodules.norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
        )
        self.linear_kv = build_module(
            submodules.linear_kv,
            config.hidden_size,
            2 * config.num_query_groups * self.head_dim,
            config=config,
            init_method=config.init_method,
            bias=config.add_qkv_bias,
            gather_output=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="kv",
            tp_group=self.tp_group,
        )
        if config.cross_qk_norm:
            self.k_layernorm = build_module(
                submodules.k_layernorm, config=config, hidden_size=self.head_dim, eps=config.layernorm_epsilon
            )
        self.indexer = Indexer(config, submodules.norm)

    def forward(self, hidden_states: Tensor, mode: ForwardMode) -> MemoryShard:
        """`[s/cp/tp, b, H]` to this rank's shard, index not yet made."""
        normed = self.norm(hidden_states)
        kv, _ = self.linear_kv(normed)
        if self.config.cross_qk_norm:
            key, value = kv.view(*kv.shape[:2], -1, 2, self.head_dim).unbind(3)
            kv = torch.stack([self.k_layernorm(key), value], dim=3).flatten(2)
        return MemoryShard(kv, self.indexer(normed) if mode.needs_projection else None)


def gather_memory(
    shard: MemoryShard, rows: RowRange, loss_rows: Tensor, mode: ForwardMode, config, pg_collection
) -> tuple[SharedMemory, MemoryShard]:
    """Gather the memory once a microbatch and make the index if no earlier stage has.

    Returns:
        The memory, and the shard with its index rows filled in, ready for the next stage.
    """
    tp_group, cp_group = pg_collection.tp, pg_collection.cp
    q_idx = k_local = None
    if shard.idx is not None:
        q_idx, k_local = gather_rows(shard.idx, tp_group).split(config.index_head_dim, dim=-1)
    key, value, k_idx = _gather_context(shard.kv, k_local, cp_group, config.kv_channels)
    q_idx = q_idx.transpose(0, 1) if q_idx is not None else None
    index = None
    if mode.needs_index:
        if shard.index is None:
            shard = MemoryShard(shard.kv, shard.idx, _index_own_rows(q_idx, k_idx, rows, config, tp_group))
        index = gather_rows(shard.index, tp_group).transpose(0, 1)
    plan = None
    if mode.cross_attention == "sparse":
        group_size = config.num_attention_heads // config.num_query_groups
        chosen, distilled = config.sparse_attention_kernel, mode.kd_loss == "selected"
        plan = dispatch.build_plan(index, rows, key.size(1), group_size, chosen, distilled)
    return SharedMemory(key, value, q_idx, k_idx, index, rows, loss_rows, plan), shard


def _gather_context(kv: Tensor, k_idx: Tensor | None, cp_group, head_dim: int):
    """One all-gather over context-parallel ranks moves K, V and K_idx together.

    Args:
        kv: `[s/cp, b, g/tp * 2 * d]`, per group K then V.
        k_idx: `[s/cp, b, d_idx]` or None.
    Returns:
        Key and value `[b, s, g/tp, d]`, K_idx `[b, s, d_idx]` or None.
    """
    parts = [kv] if k_idx is None else [kv, k_idx]
    gathered = gather_sequence(torch.cat(parts, dim=-1) if len(parts) > 1 else kv, cp_group)
    frozen = not kv.requires_grad
    kv, *rest = gathered.split([part.size(-1) for part in parts], dim=-1)
    if frozen:  # beside K_idx, which trains, they would start a backward pass through every cross layer
        kv = kv.detach()
    key, value = kv.unflatten(-1, (-1, 2, head_dim)).transpose(0, 1).unbind(3)
    return key, value, rest[0].transpose(0, 1) if rest else None


@torch.no_grad()
def _index_own_rows(q_idx: Tensor, k_idx: Tensor, rows: RowRange, config, tp_group) -> Tensor:
    """This rank scores only its own query rows; no gradient passes through top-k.

    q_idx `[b, s/cp, d_idx]`, k_idx `[b, s, d_idx]` -> `[s/cp/tp, b, k]` int32.
    """
    own_query = split_rows(q_idx.transpose(0, 1), tp_group).transpose(0, 1)
    own_rows = RowRange(*(split_rows(x.t(), tp_group).t() for x in (rows.start, rows.end)))
    index = dispatch.topk_index(own_query.contiguous(), k_idx.contiguous(), own_rows, config.index_topk)
    return index.transpose(0, 1).contiguous()
