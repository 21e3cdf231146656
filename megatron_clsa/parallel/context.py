"""What crosses the context-parallel and tensor-parallel links: shards, the memory gather, the window halo.

Owns layout and communication only, no attention. Sequences are split as Megatron splits them: 2 x cp chunks,
rank r holding chunk r and chunk 2 cp - 1 - r ("zigzag", so that causal work is even).
"""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.experimental_attention_variant import dsa_layout
from torch import Tensor


def local_positions(seq_local: int, cp_group, device) -> Tensor:
    """`[s/cp]` int64: global positions of this rank's rows."""
    return dsa_layout.build_zigzag_cp_local_positions(
        seq_local * cp_group.size(), cp_group.size(), cp_group.rank(), device
    )


def gather_sequence(x: Tensor, cp_group) -> Tensor:
    """`[s/cp, ...] -> [s, ...]` in token order. Backward sums over ranks and keeps this rank's rows."""
    if cp_group.size() == 1:
        return x
    order = dsa_layout.build_zigzag_allgather_cp_key_reorder(x.size(0), cp_group.size(), x.device)
    return gather_from_sequence_parallel_region(x, group=cp_group).index_select(0, order)


def gather_rows(x: Tensor, tp_group) -> Tensor:
    """`[s/tp, ...] -> [s, ...]` over tensor-parallel ranks. Backward sums the ranks' parts (head shards)."""
    return gather_from_sequence_parallel_region(x, group=tp_group) if tp_group.size() > 1 else x


def split_rows(x: Tensor, tp_group) -> Tensor:
    """This rank's `[s/tp, ...]` of a replicated `[s, ...]`; carries no gradient of its own."""
    return x.chunk(tp_group.size(), dim=0)[tp_group.rank()]


class _HaloExchange(torch.autograd.Function):
    """Send a tensor to the next rank and one to the previous; the ends of the line get zeros."""

    @staticmethod
    def forward(ctx, to_next: Tensor, to_previous: Tensor, group) -> tuple[Tensor, Tensor]:
        ctx.group = group
        return _exchange(to_next, to_previous, group)

    @staticmethod
    def backward(ctx, grad_from_previous: Tensor, grad_from_next: Tensor):
        # What came from the previous rank returns to it: the same exchange, seen from the other side.
        from_previous, from_next = _exchange(grad_from_next, grad_from_previous, ctx.group)
        return from_next, from_previous, None


def _exchange(to_next: Tensor, to_previous: Tensor, group) -> tuple[Tensor, Tensor]:
    # Gradients arrive with any strides, the wire wants none.
    from_previous, from_next = (
        torch.zeros_like(to_previous.contiguous()),
        torch.zeros_like(to_next.contiguous()),
    )
    rank, size = group.rank(), group.size()
    operations = []
    for peer, outgoing, incoming in ((rank + 1, to_next, from_next), (rank - 1, to_previous, from_previous)):
        if 0 <= peer < size:
            peer_rank = dist.get_global_rank(group, peer)
            operations += [
                dist.P2POp(dist.isend, outgoing.contiguous(), peer_rank, group),
                dist.P2POp(dist.irecv, incoming, peer_rank, group),
            ]
    for request in dist.batch_isend_irecv(operations) if operations else []:
        request.wait()
    return from_previous, from_next


def chunks_with_halo(x: Tensor, halo: int, cp_group) -> Tensor:
    """This rank's two chunks, each preceded by the `halo` rows before it in the sequence.

    Args:
        x: `[s/cp, b, w]`, two chunks of `c` rows. `halo <= c`; the first chunk of all gets zeros.
    Returns:
        `[2, halo + c, b, w]`.
    """
    front, back = x.chunk(2, dim=0)
    chunk = front.size(0)
    tails = front[chunk - halo :], back[chunk - halo :]
    from_previous, from_next = _HaloExchange.apply(*tails, cp_group)
    # Chunk r follows chunk r - 1 (previous rank); chunk 2cp-1-r follows 2cp-2-r (next rank). On the last
    # rank the two chunks are neighbours, so the back chunk's halo is the front chunk's tail.
    before_back = tails[0] if cp_group.rank() == cp_group.size() - 1 else from_next
    return torch.stack([torch.cat([from_previous, front]), torch.cat([before_back, back])])
