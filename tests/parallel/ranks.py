"""Runs a function on N gloo ranks of this machine and returns what each rank returned."""

import logging
import multiprocessing
import os
import socket
import traceback

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


def _worker(rank: int, world: int, port: int, function, args, results) -> None:
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
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world)
        results.put((rank, function(*args), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_ranks(world: int, function, *args, timeout: float = 240.0) -> list:
    """`[function(*args) on rank 0, .. rank world-1]`; raises with the first rank's traceback that failed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    results = context.Queue()
    port = _free_port()
    workers = [
        context.Process(target=_worker, args=(rank, world, port, function, args, results))
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
