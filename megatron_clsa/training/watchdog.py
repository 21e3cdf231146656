"""Ends a run in which nothing moves any more, and says which rank is to blame and where it stands.

Owns the watching; what moves is told to it (`beat`). Each rank publishes its last step, where its main thread
is and a pulse that counts, in the launcher's store, through a connection and a thread of its own: a rank that
hangs in a collective still answers, one that is stopped or lost does not. Clocks are not compared: those of
two hosts may differ by more than a rank may be silent.
"""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from datetime import timedelta

import torch.distributed as dist

from megatron_clsa.errors import say

EXIT_HANGS = 1
_PULSE_SECONDS = 5.0
_ANSWER_SECONDS = 20.0
_NO_STORE = "rank 0, which keeps the ranks' store, does not answer"
_WAITS = ("distributed_c10d.py", "p2p_communication.py")  # a main thread in here waits for another rank


class Watchdog:
    """Watches one rank's steps from a thread. `timeout` seconds without a beat end the process; 0 never do.

    Args:
        store: the ranks' common store; copies of its connection are taken.
    """

    def __init__(self, store: dist.Store, rank: int, ranks: int, timeout: float):
        self.rank, self.ranks, self.timeout = rank, ranks, timeout
        # Asking a store whose rank is stopped takes for ever; what is told must not wait for what is asked.
        self.told, self.asked = store.clone(), store.clone()
        self.asked.set_timeout(timedelta(seconds=10))
        self.pulse = min(_PULSE_SECONDS, timeout / 4)
        self.step, self.moved = 0, time.monotonic()
        self.pulses = 0
        self.earlier: dict[int, int] | None = None  # every rank's pulse, some time before the end
        self.stopping = threading.Event()
        self.main = threading.main_thread().ident
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        if self.timeout:
            self.thread.start()

    def stop(self) -> None:
        self.stopping.set()
        if self.timeout:
            self.thread.join(2 * self.pulse)

    def beat(self, step: int) -> None:
        """Something moved: the step after `step` begins."""
        self.step, self.moved, self.earlier = step, time.monotonic(), None

    def _watch(self) -> None:
        while not self.stopping.wait(self.pulse):
            with contextlib.suppress(Exception):  # the store's rank is gone; then no step will end either
                self.told.set(f"watchdog/{self.rank}", json.dumps(self._state()))
            left = self.moved + self.timeout - time.monotonic()
            if left < 3 * self.pulse and self.earlier is None:  # who lives publishes again before the end
                self.earlier = {}
                threading.Thread(target=self.look, args=(self.earlier,), daemon=True).start()
            if left < 0:
                self._end()

    def _state(self) -> dict:
        frames = traceback.extract_stack(sys._current_frames()[self.main])
        inner = frames[-1]
        waits = any(os.path.basename(frame.filename) in _WAITS for frame in frames)
        place = f"{inner.name} at {inner.filename}:{inner.lineno}"
        self.pulses += 1
        return {"pulse": self.pulses, "step": self.step, "waits": waits, "place": place}

    def look(self, pulses: dict[int, int]) -> None:
        """Note every rank's pulse as it is now. None of them while a rank has yet to publish its first."""
        keys = [f"watchdog/{rank}" for rank in range(self.ranks)]
        with contextlib.suppress(Exception):  # as in _watch
            if self.asked.check(keys):
                states = map(json.loads, self.asked.multi_get(keys))
                pulses.update((rank, state["pulse"]) for rank, state in enumerate(states))

    def _end(self) -> None:
        """A stopped rank 0 takes the store with it, and asking the store may then take for ever."""
        said: list[str] = []
        asking = threading.Thread(target=lambda: said.append(self.report()), daemon=True)
        asking.start()
        asking.join(_ANSWER_SECONDS)
        line = said[0] if said else self._line([_NO_STORE])
        say(line)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        os._exit(EXIT_HANGS)

    def report(self) -> str:
        """One line that names the ranks that others wait for."""
        silent, states, earlier = [], {}, self.earlier or {}
        for rank in range(self.ranks):
            try:
                states[rank] = json.loads(self.asked.get(f"watchdog/{rank}"))
            except Exception as error:
                silent.append(f"rank {rank} never answered ({type(error).__name__})")
        if self.rank not in states:  # not even what this rank wrote itself comes back
            return self._line([_NO_STORE])
        where = {rank: f"after step {state['step']}, in {state['place']}" for rank, state in states.items()}
        for rank, state in states.items():
            if rank != self.rank and state["pulse"] == earlier.get(rank):
                silent.append(f"rank {rank} has fallen silent {where[rank]}")
        busy = [f"rank {rank} is {where[rank]}" for rank, state in states.items() if not state["waits"]]
        blame = silent or busy or [f"all {self.ranks} ranks wait for each other"]
        return self._line(blame)

    def _line(self, blame: list[str]) -> str:
        what = "; ".join(blame[:8])
        return f"error: HANG: rank {self.rank} saw no step end for {self.timeout:.0f} s: {what}"


def memory_advice(error: Exception, rank: int) -> str:
    """The line for an accelerator that ran out of memory, with the flags that need less of it."""
    first = str(error).splitlines()[0][:200]
    return (
        f"error: rank {rank} ran out of GPU memory: {first} Lower --micro-batch-size, add "
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1, or raise "
        "--tensor-model-parallel-size or --context-parallel-size; --dry-run GPUS shows what each leaves"
    )
