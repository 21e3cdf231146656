"""One rank's process: it runs calls one after another, each in a process group of its own.

Owns how a process starts, is asked, answers and ends; which ranks work together is `ranks.py`'s. A process
lives on from call to call, since its start (torch, megatron-core, Transformer Engine, compiled kernels) takes
longer than most calls; a call that fails or is late ends it, and the next call starts a fresh one.
"""

import faulthandler
import gc
import inspect
import io
import logging
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from contextlib import contextmanager
from multiprocessing.connection import wait

import torch
import torch.distributed as dist

_PRELOAD = [
    "megatron_clsa.parallel.cpu",
    "megatron_clsa.model.clsa_model",
    "megatron.core.dist_checkpointing",
]


class Child:
    """A process for rank `rank` of whatever world a call names. `on_cpu`: it sees no GPU.

    `threads`: of the CPU; ranks of one machine share its cores.
    """

    def __init__(self, rank: int, on_cpu: bool = False, threads: int = 1):
        self.rank, self.on_cpu, self.threads = rank, on_cpu, threads
        self.process = None

    def start(self) -> None:
        """Start the process unless it runs; returns at once."""
        if self.process is not None:
            return
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # as in training; read when CUDA starts
        hide = self.on_cpu and torch.cuda.is_available()
        context = _context()
        self.pipe, other = context.Pipe()
        arguments = (other, self.rank, self.threads)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        with _hidden_gpus(hide):
            self.process.start()
        other.close()

    def submit(self, world: int, port: int, backend: str, limit: float, function, *args) -> None:
        """Ask for `function(*args)`, or each value that it yields; answers come in the order of asking."""
        self.start()
        self.pipe.send((world, port, backend, limit, function, args))

    def answer(self):
        """The next answer, which must be there. Raises AssertionError with the rank's traceback."""
        try:
            value, error = self.pipe.recv()
        except (EOFError, OSError):
            value, error = None, "its process ended without an answer"
        assert error is None, f"rank {self.rank} failed:\n{error}"
        return value

    def kill(self) -> None:
        """End it, whatever it does: a rank that waits for another in a collective hears nothing else."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
            self.process = None

    def close(self) -> None:
        """End it after its last answer."""
        if self.process is not None:
            self.pipe.close()
            self.process.join(20)
            self.process.kill()
            self.process = None


def collect(children: list[Child], limit: float) -> list:
    """What each child answers next. A failure, or `limit` seconds without an answer, ends them all."""
    waiting = {child.pipe: child for child in children}
    answers, deadline = {}, time.monotonic() + limit
    try:
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            late = sorted(child.rank for child in waiting.values())
            assert ready, f"ranks {late} of {len(children)} did not answer in {limit:.0f} s"
            for pipe in ready:
                child = waiting.pop(pipe)
                answers[child] = child.answer()
    except BaseException:
        for child in children:
            child.kill()
        raise
    return [answers[child] for child in children]


def _context():
    """A forkserver is quick, but has looked for GPUs before it forks: its children could use none."""
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
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


def _serve(pipe, rank: int, threads: int) -> None:
    """Answer calls until the other end closes."""
    _prepare(rank, threads)
    while True:
        try:
            world, port, backend, limit, function, args = pipe.recv()
        except (EOFError, OSError):
            return
        faulthandler.dump_traceback_later(0.9 * limit, file=sys.__stderr__)  # where it hangs
        try:
            _meet(rank, world, port, backend)
            value = function(*args)
            for part in value if inspect.isgenerator(value) else [value]:
                pipe.send((part, None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
            os._exit(1)  # other ranks may wait in a collective; parting from them in order would hang
        _part()
        faulthandler.cancel_dump_traceback_later()


def _prepare(rank: int, threads: int) -> None:
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC_")]:
        del os.environ[name]  # these ranks meet at a store of their own
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    sys.stdout = io.StringIO()  # megatron-core counts parameters aloud on every rank
    import megatron_clsa.parallel.cpu  # noqa: F401  (before megatron is imported)
    from megatron_clsa.parallel.checkpoint_io import write_in_process

    write_in_process()
    if torch.cuda.is_available():
        import multirank.layouts  # noqa: F401  (what the first call needs, while the parent prepares it)

        torch.cuda.set_device(rank % torch.cuda.device_count())
        torch.zeros(1, device="cuda")


def _meet(rank: int, world: int, port: int, backend: str) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
    )
    dist.init_process_group(backend, rank=rank, world_size=world)


def _part() -> None:
    """Leave nothing of a call to the next: groups, their NCCL buffers, the allocator's cache."""
    from megatron.core import parallel_state

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()  # no group ends while another rank still receives from this one
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
