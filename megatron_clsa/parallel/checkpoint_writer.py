"""Writes a checkpoint's files from a thread of the training process, synchronously or behind the next steps.

Owns who writes and when a save counts as written. What is in the files, and their format, is megatron-core's;
what makes a checkpoint complete is training/manifest.py's.

megatron-core 0.19.2 hands even a synchronous save's results through a queue of a *spawned manager process*, which
imports torch to unpickle them, and writes asynchronous saves from a forked or spawned writer that shares
CUDA memory with the trainer. One process and one thread need neither: `write` and `fsync` release the GIL.
"""

import queue
import threading
from importlib import import_module

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCaller, AsyncCallsQueue, AsyncRequest


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
            target=async_req.async_fn, args=(rank, buckets, results), name="checkpoint-writer"
        )
        self.thread.start()

    def is_current_async_call_done(self, blocking: bool, no_dist: bool) -> bool:
        """Whether all ranks have written; the same answer on every rank unless `no_dist`."""
        if blocking:
            self.close()
        writing = self.thread is not None and self.thread.is_alive()
        return not writing if no_dist else bool(self.sync_all_async_calls(int(writing)))

    def close(self, abort=False) -> None:
        """Wait for the files. A thread cannot be aborted, and what it writes is no checkpoint until sealed."""
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
