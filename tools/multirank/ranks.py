"""Runs a function on N ranks of this machine and returns what each rank returned.

Owns which processes work together; a process is `child.py`'s. Knows nothing of what they run.
"""

import os
import socket
from collections.abc import Callable, Iterator

import torch

from multirank.child import Child, collect

LIMIT = 240.0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(world: int, function, *args, timeout: float = LIMIT, backend: str = "gloo"):
    """`[function(*args) on rank 0, .. rank world-1]` in fresh processes; raises a failed rank's traceback."""
    children = [Child(rank) for rank in range(world)]
    values = _together(children, backend, timeout, function, *args)
    for child in children:
        child.close()
    return values


def _together(children: list[Child], backend: str, limit: float, function, *args) -> list:
    _submit(children, backend, limit, function, *args)
    return collect(children, limit)


def _submit(children: list[Child], backend: str, limit: float, function, *args) -> None:
    port = _free_port()
    for child in children:
        child.submit(len(children), port, backend, limit, function, *args)


def backend_for(world: int) -> str:
    """NCCL where each rank has a GPU of its own, else gloo."""
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= world
    return "nccl" if enough else "gloo"


class Ranks:
    """`world` ranks of this machine and one process beside them that uses the CPU alone.

    Args:
        world: number of ranks, one a GPU where there are that many.
        limit: seconds that a call may take before its ranks are ended.
    """

    def __init__(self, world: int, limit: float = LIMIT):
        self.world, self.backend, self.limit = world, backend_for(world), limit
        self.children = [Child(rank) for rank in range(world)]
        threads = min(16, (os.cpu_count() or 2) // 2) if torch.cuda.is_available() else 1
        self._aside = Child(0, on_cpu=True, threads=threads)

    def start(self) -> None:
        """Start all processes at once, before the first call needs them."""
        for child in (*self.children, self._aside):
            child.start()

    def everywhere(self, function, *args) -> list:
        """What each rank returned."""
        return _together(self.children, self.backend, self.limit, function, *args)

    def among(self, world: int, function, *args) -> list:
        """What each of the first `world` ranks returned."""
        return _together(self.children[:world], backend_for(world), self.limit, function, *args)

    def in_parts(self, parts: int, function, *args, world: int | None = None) -> Iterator[list]:
        """For each of the `parts` values that `function` yields, what each rank (the first `world`) did."""
        children = self.children[:world]
        _submit(children, backend_for(len(children)), self.limit, function, *args)
        for _ in range(parts):
            yield collect(children, self.limit)

    def alone(self, function, *args, limit: float | None = None):
        """What rank 0 returns in a world of its own."""
        return _together(self.children[:1], self.backend, limit or self.limit, function, *args)[0]

    def aside(self, function, *args, limit: float | None = None) -> Callable[[], object]:
        """Begin a call on the CPU beside the ranks; what comes back waits for its value.

        Values must be waited for in the order of the calls.
        """
        limit = limit or self.limit
        self._aside.submit(1, _free_port(), "gloo", limit, function, *args)
        return lambda: collect([self._aside], limit)[0]

    def close(self) -> None:
        for child in (*self.children, self._aside):
            child.close()
