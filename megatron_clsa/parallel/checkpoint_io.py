"""How checkpoint files are written and read: from a thread of the trainer, and never as free pickle.

Owns who writes, when a save counts as written, and which pickles are refused. The format is megatron-core's;
what makes a checkpoint complete is convert/manifest.py's.

megatron-core 0.19.2 sends even a synchronous save's results through a spawned manager process, which imports
torch to unpickle them, and writes asynchronous saves from another process that shares CUDA memory with the
trainer. A thread needs neither: `write` and `fsync` release the GIL.
"""

import pickle
import queue
import threading
import types
from collections.abc import Callable
from importlib import import_module

import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCaller, AsyncCallsQueue, AsyncRequest
from torch.distributed.checkpoint._traverse import set_element


class ThreadCaller(AsyncCaller):
    """Runs one save's write function in a thread; the next training steps go on meanwhile."""

    def __init__(self):
        self.thread: threading.Thread | None = None

    def schedule_async_call(self, async_req: AsyncRequest) -> None:
        """Copy what is to be saved, then write the copy. The model may change as soon as this returns."""
        if async_req.async_fn is None:
            return
        rank, buckets, results = async_req.async_fn_args
        buckets = [_copied(bucket) for bucket in buckets]
        self.thread = threading.Thread(
            target=async_req.async_fn, args=(rank, buckets, results), name="checkpoint-writer", daemon=True
        )
        self.thread.start()

    def is_current_async_call_done(self, blocking: bool, no_dist: bool) -> bool:
        """Whether all ranks have written; the same answer on every rank unless `no_dist`."""
        if blocking:
            self.close()
        writing = self.thread is not None and self.thread.is_alive()
        return not writing if no_dist else bool(self.sync_all_async_calls(int(writing)))

    def close(self, abort=False) -> None:
        """Wait for the files. A thread cannot be aborted; what it writes is no checkpoint until sealed."""
        if self.thread is not None:
            self.thread.join()

    def __del__(self):
        pass


def _copied(bucket: tuple) -> tuple:
    """The bucket with its tensors in host memory of their own."""
    file, key, (blobs, tensors) = bucket
    return file, key, (blobs, [(item, tensor.detach().to("cpu", copy=True)) for item, tensor in tensors])


class ThreadedCallsQueue(AsyncCallsQueue):
    """Megatron's queue of unfinished saves, with a thread in place of its worker process."""

    def _get_async_caller(self) -> ThreadCaller:
        return ThreadCaller()

    @classmethod
    def warmup_persistent_caller(cls, *args, **named) -> None:
        """There is no process to start ahead."""


def write_in_process() -> None:
    """Put the above in the place of megatron-core's processes, for synchronous saves too."""
    strategies = "megatron.core.dist_checkpointing.strategies"
    writer = import_module(f"{strategies}.filesystem_async")
    writer.get_write_results_queue = lambda mp_mode=None: queue.Queue()  # one a save
    writer._process_memory = lambda: 0  # for a debug line, and it needs psutil
    import_module(f"{strategies}.async_utils").AsyncCallsQueue = ThreadedCallsQueue


def refuse_pickles(load_index: Callable) -> None:
    """Read the index of a checkpoint with `load_index(file)` and its objects with `weights_only=True`.

    torch.distributed.checkpoint unpickles both as they come, so that a planted file would run.
    """
    filesystem = import_module("torch.distributed.checkpoint.filesystem")
    filesystem.pickle = types.SimpleNamespace(load=load_index, dump=pickle.dump)
    planner = import_module("torch.distributed.checkpoint.default_planner")
    planner.DefaultLoadPlanner.load_bytes = _load_plain_objects


def _load_plain_objects(self, read_item, value) -> None:
    """`DefaultLoadPlanner.load_bytes`, but with `weights_only=True`."""
    name, loaded = read_item.dest_index.fqn, torch.load(value, weights_only=True)
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[name], loaded)
    else:
        self.state_dict[name] = loaded
