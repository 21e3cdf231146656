"""Starts the ranks of one machine as plain processes and answers with the exit code that they agree on.

torchrun cannot: whatever its workers answer, it prints a traceback and answers 1, so 2 (bad input) and 75
(saved, run me again) are lost. Owns nothing that happens inside a rank, and imports nothing heavy. Several
machines: torchrun, or one srun task a rank.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

from megatron_clsa.errors import EXIT_BAD_INPUT, UserError, one_line_errors

FLAG = "--nproc-per-node"
EXIT_DONE, EXIT_SAVED, EXIT_FAILED = 0, 75, 1
GRACE_SECONDS = 30  # for the other ranks once one has failed; they hang in a collective then


def train(words: list[str]) -> int:
    """Train, in this process. The import takes seconds, which the process that starts ranks does without."""
    import megatron_clsa.parallel.cpu  # noqa: F401  (before megatron is imported)
    from megatron_clsa.training.run import main

    return main(words)


@one_line_errors
def launch(main: Callable[[list[str]], int], script: str, words: list[str]) -> int:
    """Call `main(words)` or, with `--nproc-per-node N`, start `script` as N ranks and wait for them."""
    ranks, rest = take_ranks(words)
    if ranks is None or "--dry-run" in words:
        return main(words)
    if "RANK" in os.environ:
        raise UserError(f"{FLAG} {ranks}: a launcher has started this rank already; drop one of the two")
    return wait_for(start_ranks([sys.executable, script, *rest], ranks))


def take_ranks(words: list[str]) -> tuple[int | None, list[str]]:
    """The value of `--nproc-per-node`, None without it, and the other words."""
    value, rest, words = None, [], list(words)
    while words:
        word = words.pop(0)
        if word == FLAG:
            value = words.pop(0) if words else ""
        elif word.startswith(FLAG + "="):
            value = word.partition("=")[2]
        else:
            rest.append(word)
    if value is None:
        return None, rest
    if not value.isdigit() or int(value) < 1:
        raise UserError(f"{FLAG} {value}: give the number of processes to start on this machine")
    return int(value), rest


def start_ranks(command: list[str], ranks: int) -> list[subprocess.Popen]:
    """`ranks` processes of `command`, told by the environment who they are, as torchrun tells them."""
    shared = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks))),
    }
    return [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            preexec_fn=_end_with_parent,
        )
        for rank in range(ranks)
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _end_with_parent() -> None:
    """A killed launcher must not leave ranks behind: PR_SET_PDEATHSIG is option 1 of prctl."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def wait_for(ranks: list[subprocess.Popen]) -> int:
    """Pass signals on, wait for all ranks, end those that outlive a failed one. Returns the exit code."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda received, _: [rank.send_signal(received) for rank in ranks])
    failed: int | None = None
    deadline = float("inf")
    try:
        while None in [rank.poll() for rank in ranks]:
            if failed is None and (failed := _first_failure(ranks)) is not None:
                deadline = time.monotonic() + GRACE_SECONDS
            refused = ranks[0].returncode == EXIT_BAD_INPUT  # and has said why; the others wait to speak
            if refused or time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        for rank in ranks:
            rank.kill()
    failed = _first_failure(ranks) if failed is None else failed
    return failed if failed in (EXIT_BAD_INPUT, EXIT_SAVED) else EXIT_FAILED if failed else EXIT_DONE


def _first_failure(ranks: list[subprocess.Popen]) -> int | None:
    return next((rank.returncode for rank in ranks if rank.returncode), None)
