"""Runs a function on N ranks of this machine and returns what each rank returned.

Owns how ranks start: spawned here, or already there under torchrun. Knows nothing of what they run.
"""

import io
import logging
import multiprocessing
import os
import queue
import socket
import sys
import traceback
import warnings
from contextlib import contextmanager

import torch
import torch.distributed as dist

_PRELOAD = [
    "megatron_clsa.parallel.cpu",
    "megatron_clsa.model.clsa_model",
    "megatron.core.dist_checkpointing",
]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _worker(rank: int, world: int, port: int, backend: str, function, args, results) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        OMP_NUM_THREADS="1",
    )
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # these ranks meet at a store of their own
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    sys.stdout = io.StringIO()  # megatron-core counts parameters aloud on every rank
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(rank % torch.cuda.device_count())
        dist.init_process_group(backend, rank=rank, world_size=world)
        results.put((rank, function(*args), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _context(on_cpu: bool):
    """How children start: a forkserver is quick, but it has looked for GPUs before it can hide them."""
    context = multiprocessing.get_context("spawn" if on_cpu else "forkserver")
    if not on_cpu:
        context.set_forkserver_preload(_PRELOAD)
    return context


@contextmanager
def _hidden_gpus(hide: bool):
    """Children started inside see no GPU."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hide:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield
    finally:
        if hide:
            os.environ.pop("CUDA_VISIBLE_DEVICES")
            os.environ.update({} if before is None else {"CUDA_VISIBLE_DEVICES": before})


def run_share(
    mine, world: int, port: int, function, *args, timeout: float, backend: str, on_cpu: bool = False
) -> list:
    """Start the ranks `mine` of `world` ranks that meet at `port`; what each of them returned."""
    context = _context(on_cpu)
    results = context.Queue()
    workers = [
        context.Process(target=_worker, args=(rank, world, port, backend, function, args, results))
        for rank in mine
    ]
    with _hidden_gpus(on_cpu):
        for worker in workers:
            worker.start()
    values = {}
    try:
        for _ in workers:
            rank, value, error = results.get(timeout=timeout)
            assert error is None, f"rank {rank} of {world} failed:\n{error}"
            values[rank] = value
    except queue.Empty:
        late = sorted(set(mine) - set(values))
        raise AssertionError(f"ranks {late} of {world} did not answer in {timeout:.0f} s") from None
    finally:
        for worker in workers:
            worker.terminate() if worker.is_alive() and len(values) < len(workers) else worker.join(10)
    return [values[rank] for rank in mine]


def run_ranks(world: int, function, *args, timeout: float = 240.0, backend: str = "gloo", on_cpu=False):
    """`[function(*args) on rank 0, .. rank world-1]`; raises with the first rank's traceback that failed."""
    options = dict(timeout=timeout, backend=backend, on_cpu=on_cpu)
    return run_share(range(world), world, _free_port(), function, *args, **options)


def backend_for(world: int) -> str:
    """NCCL where each rank has a GPU of its own, else gloo."""
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= world
    return "nccl" if enough else "gloo"


class Spawned:
    """Starts fresh ranks for every call: a layout that fails leaves the others their turn."""

    chief = True

    def __init__(self, world: int, timeout: float = 240.0):
        self.world, self.backend, self.timeout = world, backend_for(world), timeout

    def shared_folder(self, own: str) -> str:
        """A folder that every rank sees."""
        return own

    def everywhere(self, function, *args, world: int | None = None) -> list:
        """What each of the first `world` ranks (all) returned."""
        return run_ranks(world or self.world, function, *args, backend=self.backend, timeout=self.timeout)

    def alone(self, function, *args, on_cpu: bool = False):
        """What one process returns that has a world of its own."""
        backend = "gloo" if on_cpu else self.backend
        return run_ranks(1, function, *args, backend=backend, timeout=self.timeout, on_cpu=on_cpu)[0]

    def close(self) -> None:
        """Nothing is kept open between calls."""


class Torchrun:
    """The ranks that torchrun started; each starts one child a call, and only the children use GPUs.

    Every rank makes the same calls in the same order. A child ends with its layout, so that NCCL's buffers
    do not pile up over layouts, and one that fails leaves the others their turn.
    """

    def __init__(self, timeout: float = 240.0):
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.backend, self.timeout = backend_for(int(os.environ["LOCAL_WORLD_SIZE"])), timeout
        dist.init_process_group("gloo")
        self.chief = self.rank == 0

    def shared_folder(self, own: str) -> str:
        """Rank 0's."""
        return self._from_chief(own)

    def _from_chief(self, value):
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def everywhere(self, function, *args, world: int | None = None) -> list:
        """What each of the first `world` ranks (all) returned."""
        world, port = world or self.world, self._from_chief(_free_port())
        mine = [self.rank] if self.rank < world else []
        shares = [None] * self.world
        share = _attempt(mine, world, port, function, *args, timeout=self.timeout, backend=self.backend)
        dist.all_gather_object(shares, share)
        if errors := [error for _, error in shares if error]:
            raise AssertionError(errors[0])
        return [values[0] for values, _ in shares[:world]]

    def alone(self, function, *args, on_cpu: bool = False):
        """What rank 0's own child process returns; it has a world of its own."""
        backend, mine = "gloo" if on_cpu else self.backend, [0] if self.chief else []
        options = dict(timeout=self.timeout, backend=backend, on_cpu=on_cpu)
        values, error = self._from_chief(_attempt(mine, 1, _free_port(), function, *args, **options))
        assert error is None, error
        return values[0]

    def close(self) -> None:
        """Wait for the other ranks and part."""
        dist.barrier()
        dist.destroy_process_group()


def _attempt(mine, *args, **options) -> tuple[list, str | None]:
    """`run_share` with its failure as a text, which travels to the other ranks."""
    try:
        return (run_share(mine, *args, **options) if mine else []), None
    except AssertionError as error:
        return [], str(error)


def ranks_of(world: int | None, timeout: float = 240.0) -> Spawned | Torchrun:
    """torchrun's ranks where it started this process, else `world` of our own."""
    return Torchrun(timeout) if "TORCHELASTIC_RUN_ID" in os.environ else Spawned(world, timeout)
