"""Runs a function on N ranks of this machine and returns what each rank returned.

Owns how ranks start: spawned here, or already there under torchrun. Knows nothing of what they run.
"""

import io
import logging
import multiprocessing
import os
import socket
import sys
import traceback
import warnings

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


def run_ranks(world: int, function, *args, timeout: float = 240.0, backend: str = "gloo") -> list:
    """`[function(*args) on rank 0, .. rank world-1]`; raises with the first rank's traceback that failed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    results = context.Queue()
    port = _free_port()
    workers = [
        context.Process(target=_worker, args=(rank, world, port, backend, function, args, results))
        for rank in range(world)
    ]
    for worker in workers:
        worker.start()
    values = {}
    try:
        for _ in workers:
            rank, value, error = results.get(timeout=timeout)
            assert error is None, f"rank {rank} of {world} failed:\n{error}"
            values[rank] = value
    finally:
        for worker in workers:
            worker.terminate() if worker.is_alive() and len(values) < world else worker.join(10)
    return [values[rank] for rank in range(world)]


def backend_for(world: int) -> str:
    """NCCL where each rank has a GPU of its own, else gloo."""
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= world
    return "nccl" if enough else "gloo"


class Spawned:
    """Starts fresh ranks for every call: a layout that fails leaves the others their turn."""

    chief = True

    def __init__(self, world: int):
        self.world, self.backend = world, backend_for(world)

    def shared_folder(self, own: str) -> str:
        """A folder that every rank sees."""
        return own

    def everywhere(self, function, *args) -> list:
        """What each rank returned."""
        return run_ranks(self.world, function, *args, backend=self.backend)

    def alone(self, function, *args):
        """What one process returns that has a world of its own."""
        return run_ranks(1, function, *args, backend=self.backend)[0]


class Torchrun:
    """The ranks that torchrun started; every rank makes the same calls in the same order."""

    def __init__(self):
        self.world, self.backend = (
            int(os.environ["WORLD_SIZE"]),
            backend_for(int(os.environ["LOCAL_WORLD_SIZE"])),
        )
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        dist.init_process_group(self.backend)
        self.chief = dist.get_rank() == 0

    def shared_folder(self, own: str) -> str:
        """Rank 0's."""
        folder = [own]
        dist.broadcast_object_list(folder)
        return folder[0]

    def everywhere(self, function, *args) -> list:
        """What each rank returned."""
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        results = [None] * self.world
        dist.all_gather_object(results, function(*args))
        return results

    def alone(self, function, *args):
        """What rank 0's own child process returns; it has a world of its own."""
        result = [run_ranks(1, function, *args, backend=self.backend)[0] if self.chief else None]
        dist.broadcast_object_list(result)
        return result[0]


def ranks_of(world: int | None) -> Spawned | Torchrun:
    """torchrun's ranks where it started this process, else `world` of our own."""
    return Torchrun() if "TORCHELASTIC_RUN_ID" in os.environ else Spawned(world)
