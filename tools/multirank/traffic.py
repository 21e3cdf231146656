"""Counts what collectives bring to this rank: calls and received bytes, by link and operation.

Owns the count of operations as they are issued, over any backend; what should cross is estimate/links.py's.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.utils._python_dispatch import TorchDispatchMode

# Operation: its name in reports, which argument's bytes count, and how often other ranks' share arrives.
OPERATIONS = {
    "_allgather_base_": ("all-gather", 0, 1),
    "allgather_into_tensor_coalesced_": ("all-gather", 0, 1),
    "_reduce_scatter_base_": ("reduce-scatter", 1, 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1, 1),
    "allreduce_": ("all-reduce", 0, 2),
    "allreduce_coalesced_": ("all-reduce", 0, 2),
}
RECEIVE = "receive"
# Metadata: shapes of packets and the like.
SMALL = 256

Received = dict[str, dict[str, tuple[int, float]]]


class Traffic(TorchDispatchMode):
    """While active, adds up calls and bytes by process group and operation."""

    def __init__(self):
        super().__init__()
        self.seen: dict[tuple[str, str], tuple[int, float]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self._count(function._schema.name.removeprefix("c10d::"), args)
        return function(*args, **(kwargs or {}))

    def _count(self, name: str, args) -> None:
        group = next(dist.ProcessGroup.unbox(x) for x in args if isinstance(x, torch.ScriptObject))
        if name == "recv_":
            operation, size = RECEIVE, sum(x.nbytes for x in args[0])
        elif name in OPERATIONS:
            operation, place, times = OPERATIONS[name]
            tensors = args[place] if isinstance(args[place], list | tuple) else [args[place]]
            size = times * sum(x.nbytes for x in tensors) * (group.size() - 1) / group.size()
        else:
            return
        calls, total = self.seen.get((group.group_name, operation), (0, 0.0))
        self.seen[group.group_name, operation] = calls + (size >= SMALL), total + size

    def by_link(self) -> Received:
        """`{"TP": {"all-gather": (calls, bytes), ..}, "CP": .., ..}`; of tiny calls the bytes only."""
        found: Received = {link: {} for link in ("TP", "CP", "PP", "DP")}
        for (name, operation), (calls, size) in self.seen.items():
            link = _links().get(name)
            if link is None and operation == RECEIVE:
                link = "PP"  # Megatron receives over a second group to overlap both directions
            if link and size:
                before = found[link].get(operation, (0, 0.0))
                found[link][operation] = before[0] + calls, before[1] + size
        return found


def _links() -> dict[str, str]:
    groups = {
        "DP": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "TP": parallel_state.get_tensor_model_parallel_group(),
        "CP": parallel_state.get_context_parallel_group(),
        "PP": parallel_state.get_pipeline_model_parallel_group(),
    }
    return {group.group_name: link for link, group in groups.items()}


def totals(received: Received) -> dict[str, float]:
    """Bytes by link."""
    return {link: sum(size for _, size in operations.values()) for link, operations in received.items()}
