"""What crosses a pipeline link: one packed tensor a microbatch.

Megatron's schedules back-propagate through the first output of a stage only, so everything rides in one
`[s/cp/tp, b, width]` tensor and autograd carries dK, dV, dQ_idx and dK_idx back with the hidden states:

    before the memory:  hidden | documents
    after it:           hidden | documents | carrier | kd | K, V of this rank's heads | Q_idx, K_idx | index

Integers and the fp32 loss value are bit-cast to the pipeline's dtype and never pass through arithmetic.
Owns the packing only; which parts exist follows from the forward mode on both sides of the link.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_clsa.parallel.context import gather_rows, split_rows


@dataclass(frozen=True)
class MemoryShard:
    """This rank's part of the memory: its sequence shard, its KV heads.

    Attributes:
        kv: `[s/cp, b, g/tp * 2 * d]`, per group K then V.
        idx: `[s/cp/tp, b, 2 d_idx]` Q_idx and K_idx, or None when the mode needs neither.
        index: `[s/cp/tp, b, k]` int32, or None when the mode needs none or it is not made yet.
    """

    kv: Tensor
    idx: Tensor | None
    index: Tensor | None = None


@dataclass(frozen=True)
class StageState:
    """Everything that one stage hands to the next.

    Attributes:
        hidden: `[s/cp/tp, b, H]`.
        documents: `[b, s/cp]` int32, each row's document start, `-1 - start` where the losses skip the row.
        shard: this rank's part of the memory, from the memory on.
        carrier: `[s/cp/tp, b, 1]` zeros through which the distillation loss joins the backward pass.
        kd_sum: fp32 scalar, the distillation cross-entropy so far, this rank's heads only.
    """

    hidden: Tensor
    documents: Tensor
    shard: MemoryShard | None = None
    carrier: Tensor | None = None
    kd_sum: Tensor | None = None


def _bits(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.contiguous().view(dtype)


def _slots(dtype: torch.dtype, count: int = 1) -> int:
    """Elements of `dtype` that hold `count` 32-bit values."""
    return count * (4 // dtype.itemsize)


def pack(state: StageState, tp_group) -> Tensor:
    """`StageState` to `[s/cp/tp, b, width]`."""
    hidden, dtype = state.hidden, state.hidden.dtype
    rows, batch = hidden.shape[:2]
    documents = split_rows(state.documents.t(), tp_group).unsqueeze(-1)
    parts = [hidden, _bits(documents, dtype)]
    if state.shard is not None:
        kd_sum = state.kd_sum.detach().float().expand(rows, batch, 1)
        parts += [state.carrier, _bits(kd_sum, dtype), _rows_of_kv(state.shard.kv, rows)]
        if state.shard.idx is not None:
            parts.append(state.shard.idx)
        if state.shard.index is not None:
            parts.append(_bits(state.shard.index, dtype))
    return torch.cat(parts, dim=-1)


def _rows_of_kv(kv: Tensor, rows: int) -> Tensor:
    """`[s/cp, b, w] -> [s/cp/tp, b, w tp]`: the same memory seen with the hidden states' rows."""
    return kv.contiguous().view(rows, kv.size(1), -1)


def packet_widths(config, mode, after_memory: bool, dtype: torch.dtype) -> dict[str, int]:
    """Width of each part, in elements of `dtype`, in packing order. `mode`: the pass's `ForwardMode`."""
    widths = {"hidden": config.hidden_size, "documents": _slots(dtype)}
    if after_memory:
        widths |= {
            "carrier": 1,
            "kd_sum": _slots(dtype),
            "kv": 2 * config.num_query_groups * config.kv_channels,
            "idx": 2 * config.index_head_dim if mode.needs_projection else 0,
            "index": _slots(dtype, config.index_topk) if mode.needs_index else 0,
        }
    return widths


def unpack(packet: Tensor, config, mode, after_memory: bool, tp_group) -> StageState:
    """The inverse of `pack`."""
    widths = packet_widths(config, mode, after_memory, packet.dtype)
    part = dict(zip(widths, packet.split(list(widths.values()), dim=-1), strict=True))
    documents = _bits(part["documents"].detach(), torch.int32).squeeze(-1)
    documents = gather_rows(documents, tp_group).t()
    hidden = part["hidden"].contiguous()
    if not after_memory:
        return StageState(hidden, documents)
    rows, batch = packet.shape[:2]
    kv = part["kv"].contiguous().view(rows * tp_group.size(), batch, -1)
    idx = part["idx"].contiguous() if mode.needs_projection else None
    index = _bits(part["index"].detach(), torch.int32) if mode.needs_index else None
    kd_sum = _bits(part["kd_sum"].detach(), torch.float32)[0, 0, 0]
    return StageState(hidden, documents, MemoryShard(kv, idx, index), part["carrier"], kd_sum)
