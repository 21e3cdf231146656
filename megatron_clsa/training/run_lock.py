"""One writer a run: a second job on the same folder is refused, a dead job's hold on it is not.

Owns OUT/run.lock, which names its holder and whose time stamp the holder renews. No `flock`: network file
systems ignore it or hang. Clocks are not compared: a hold is dead if its stamp stands still while one looks.
"""

import contextlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megatron_clsa.errors import UserError, say

NAME = "run.lock"
EXIT_LOST = 1
_BEAT_SECONDS = 15.0
_DEAD_SECONDS = 90.0  # network file systems show a new stamp up to a minute late
_SETTLE_SECONDS = 1.0


class RunLock:
    """Held by rank 0 from `take` until `release`; a killed process leaves it to be found dead."""

    def __init__(self, folder: Path):
        self.path = folder / NAME
        self.token = uuid.uuid4().hex
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._renew, name="run-lock", daemon=True)

    def take(self) -> None:
        """Hold the folder.

        Raises:
            UserError: if a living job holds it, or it cannot be written.
        """
        text = json.dumps(_this_process() | {"token": self.token})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._make(text)
        except OSError as error:
            raise UserError(f"--out {self.path.parent} cannot be written: {error.strerror}") from None
        self.thread.start()

    def _make(self, text: str) -> None:
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            self._take_over(text)
            return
        os.write(descriptor, text.encode())
        os.close(descriptor)

    def _take_over(self, text: str) -> None:
        held = _read(self.path)
        if held and not _is_dead(held, self.path):
            raise _refusal(self.path, held)
        draft = self.path.with_name(f"{NAME}.{self.token}")
        draft.write_text(text)
        os.replace(draft, self.path)
        time.sleep(_SETTLE_SECONDS)  # two jobs may find the same hold dead: the last one to write has it
        if (now := _read(self.path)).get("token") != self.token:
            raise _refusal(self.path, now)

    def _renew(self) -> None:
        while not self.ended.wait(_BEAT_SECONDS):
            held = _read(self.path)
            if held and held["token"] != self.token:
                # Suspended for so long that another job took over: two writers would ruin both.
                say(f"error: {_refusal(self.path, held)}")
                os._exit(EXIT_LOST)
            with contextlib.suppress(OSError):
                os.utime(self.path)  # needs no room on a full disk

    def release(self) -> None:
        """Let go of the folder."""
        self.ended.set()
        if _read(self.path).get("token") == self.token:
            self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def one_writer(folder: Path, store: dist.Store, rank: int, ranks: int):
    """Hold a run's folder; every rank raises alike if another job has it."""
    lock = RunLock(folder)
    refusal = _told_by_rank_0(lock.take, store, rank, ranks)
    if refusal:
        raise UserError(refusal)
    try:
        yield
    finally:
        if rank == 0:
            lock.release()


def _told_by_rank_0(take: Callable[[], None], store: dist.Store, rank: int, ranks: int) -> str:
    """Why `take` failed on rank 0, or nothing. Rank 0 keeps the store: it leaves when all have read it."""
    if rank == 0:
        try:
            take()
            store.set("lock/refusal", "")
        except UserError as error:
            store.set("lock/refusal", str(error))
    refusal = store.get("lock/refusal").decode()
    store.add("lock/read", 1)
    deadline = time.monotonic() + 10
    while rank == 0 and refusal and store.add("lock/read", 0) < ranks and time.monotonic() < deadline:
        time.sleep(0.05)
    return refusal


def _this_process() -> dict:
    """Who holds: enough to tell, on the same machine, whether it lives."""
    job = os.environ.get("SLURM_JOB_ID")
    return {
        "host": os.uname().nodename,
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "job": job and f"{job} restart {os.environ.get('SLURM_RESTART_COUNT', '0')}",
    }


def _machine() -> str:
    """This boot of this host, and the namespace in which its process numbers mean something."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")


def _started(pid: int) -> str | None:
    """When a process started, in ticks since boot, None if there is none: process numbers come again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _read(path: Path) -> dict:
    """What a lock says; nothing if it is gone or unreadable."""
    try:
        content = json.loads(path.read_text())
        return content if {"host", "machine", "pid", "started", "job", "token"} <= content.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _is_dead(held: dict, path: Path) -> bool:
    mine = _this_process()
    if held["machine"] == mine["machine"]:
        return _started(held["pid"]) != held["started"]
    if held["job"] and mine["job"]:
        job, _, restart = held["job"].partition(" ")
        if mine["job"].partition(" ")[0] == job and mine["job"].partition(" ")[2] != restart:
            return True  # Slurm runs a job once: what it ran before the requeue has ended
    say(f"{path}: held by {_name(held)}; looking for {_DEAD_SECONDS:.0f} s whether it lives")
    return _stands_still(path)


def _stands_still(path: Path) -> bool:
    seen, deadline = _stamp(path), time.monotonic() + _DEAD_SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(1.0, _DEAD_SECONDS / 10))
        if (now := _stamp(path)) != seen:
            return now is None  # gone: its holder let go of it
    return True


def _stamp(path: Path) -> int | None:
    """Opened for it: network file systems ask their server only then."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _name(held: dict) -> str:
    return f"process {held['pid']} on {held['host']}" + (f" (Slurm job {held['job']})" if held["job"] else "")


def _refusal(path: Path, held: dict) -> UserError:
    return UserError(
        f"--out {path.parent}: {_name(held) if held else 'another process'} is writing this run; "
        "end it first, or give another --out"
    )
