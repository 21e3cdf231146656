"""Saves checkpoints as training does, one after the other, until somebody ends it: `saver.py FOLDER ROUNDS`.

Each round is a fork that is killed at a random instant; megatron is imported once. Prints a line a round.
"""

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies import async_utils
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

import megatron_clsa.parallel.cpu  # noqa: F401
from megatron_clsa.convert import manifest
from megatron_clsa.parallel.checkpoint_io import write_in_process
from megatron_clsa.parallel.cpu import wrap_save
from megatron_clsa.training import durable

SIZE = 300_000


def save_forever(phase: Path) -> None:
    """Asynchronous saves of a tensor that holds the step, two kept."""
    file = tempfile.mktemp()
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    write_in_process()
    wrap_save(durable.save_durably)
    durable.get_args = lambda: SimpleNamespace(keep_last=2, keep_every=None)
    queue = async_utils.AsyncCallsQueue()
    durable.maybe_finalize_async_save = queue.maybe_finalize_async_calls
    step = max(manifest.steps_in(phase), default=0)
    while True:
        step += 1
        folder = manifest.step_folder(phase, step)
        folder.mkdir(exist_ok=True)
        tensors = {
            name: ShardedTensor.from_rank_offsets(name, torch.full((SIZE,), float(step))) for name in "ab"
        }
        request = dist_checkpointing.save(
            tensors, str(folder), TorchDistSaveShardedStrategy(), async_sharded_save=True
        )
        queue.schedule_async_request(request)
        queue.maybe_finalize_async_calls(blocking=True)


def kill_in_rounds(phase: Path, rounds: int, seed: int = 7) -> None:
    instants = random.Random(seed)
    for _ in range(rounds):
        newest = max(manifest.complete_steps(phase), default=0)
        child = os.fork()
        if child == 0:
            save_forever(phase)
        started = time.monotonic()
        while not newest and not manifest.complete_steps(phase) and time.monotonic() < started + 60:
            time.sleep(0.01)  # the first round must leave something to come back to
        time.sleep(instants.uniform(0.02, 0.6))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print("steps", *manifest.steps_in(phase), "complete", *manifest.complete_steps(phase), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    kill_in_rounds(Path(sys.argv[1]), int(sys.argv[2]))
