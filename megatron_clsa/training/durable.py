"""A save that is complete or absent: every rank checksums what it wrote, one rank seals the whole last.

Owns what happens around `dist_checkpointing.save`, the look at the disk before it, and the line that a failed
save ends a run with. Which checkpoint is loaded: checkpoint.py; what the manifest holds: convert/manifest.py.
"""

import shutil
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, is_main_replica
from megatron.training import get_args
from megatron.training.async_utils import maybe_finalize_async_save
from torch.distributed.checkpoint.api import CheckpointException

from megatron_clsa.convert import manifest
from megatron_clsa.errors import UserError

_WRITTEN_BY_RANK_0 = (".metadata", "metadata.json")


def save_durably(
    save: Callable, state_dict: dict, folder: str, strategy=None, *, async_sharded_save=False, **named
):
    """Around megatron-core's `save`: the same request or result, with a manifest as its last file."""
    clear_room(state_dict, Path(folder))
    sealed = SealedSave(Path(folder))
    named["async_strategy"] = "mcore"
    request = sealed.around(save(state_dict, folder, strategy, async_sharded_save=True, **named))
    if async_sharded_save:
        return request
    request.execute_sync()
    return None


def clear_room(state_dict: dict, folder: Path) -> None:
    """Empty the folder of a save; refuse the save if the disk has no room for it, before a byte is written.

    A save that is under way is finished first: it may be the newest, and old ones go when it is complete.

    Raises:
        UserError: the same on every rank.
    """
    maybe_finalize_async_save(blocking=True)
    wanted = torch.tensor(float(_size(state_dict)), dtype=torch.float64, device=torch.cuda.current_device())
    dist.all_reduce(wanted)
    wanted, free = int(wanted), [0]
    if dist.get_rank() == 0:
        manifest.unseal(folder)  # a save of this step that was cut short takes room
        free = [_free(folder)]
    dist.broadcast_object_list(free)
    if wanted <= free[0]:
        return
    if dist.get_rank() == 0:
        folder.rmdir()  # made for this save
    newest = next(iter(manifest.complete_steps(folder.parent)), None)
    raise UserError(
        f"{folder} was not written: it takes {_mib(wanted)} MiB and {_mib(free[0])} MiB are free there; "
        f"newest complete checkpoint: {'none' if newest is None else f'step {newest}'}; make room "
        "(--keep-last 2 keeps two), then run the same command again"
    )


def _size(state_dict: dict) -> int:
    """Bytes that this rank writes: tensors, and what the format adds to each."""
    pieces = (piece for piece in nested_values(state_dict) if isinstance(piece, ShardedBase))
    written = [getattr(piece, "data", None) for piece in pieces if is_main_replica(piece.replica_id)]
    return sum(_ADDED_BYTES + getattr(content, "nbytes", 0) for content in written)


_ADDED_BYTES = 4096  # a tensor's header and its entry in the index: 2 KiB and more in a small checkpoint


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"


class SealedSave:
    """One checkpoint on its way to disk. Made on every rank before anything is written."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files: dict[str, manifest.FileRecord] = {}  # of this rank

    def around(self, request):
        """megatron-core's request, with checksums after the writing and the seal after everything."""
        finalize = [partial(self._one_line, step) for step in [*request.finalize_fns, self._seal]]
        write = request.async_fn and partial(self._write, request.async_fn)
        return request._replace(async_fn=write, finalize_fns=finalize)

    def _write(self, write: Callable, rank: int, buckets: list, results) -> None:
        """Runs in the writer's thread. A failed write is in `results`; its files need no checksum."""
        write(rank, buckets, results)
        paths = [Path(path) for path, _, _ in buckets]
        self.files = {path.name: manifest.describe(path) for path in paths if path.is_file()}

    def _seal(self) -> None:
        every: list = [None] * dist.get_world_size()
        dist.all_gather_object(every, self.files)
        fault = [None]
        if dist.get_rank() == 0:
            try:
                self._seal_all({name: record for files in every for name, record in files.items()})
            except OSError as error:
                fault[0] = error
        dist.broadcast_object_list(fault)
        if fault[0] is not None:
            raise fault[0]

    def _seal_all(self, files: dict[str, manifest.FileRecord]) -> None:
        for name in _WRITTEN_BY_RANK_0:
            files[name] = manifest.describe(self.folder / name)
        about = {"ranks": dist.get_world_size(), "versions": {name: version(name) for name in _VERSIONS}}
        manifest.seal(self.folder, files, about)
        args = get_args()
        if args.keep_last:
            manifest.prune(self.folder.parent, args.keep_last, args.keep_every)

    def _one_line(self, step: Callable) -> None:
        try:
            step()
        except (CheckpointException, OSError) as error:
            raise _failed(self.folder, error) from error


_VERSIONS = ("torch", "megatron-core")


def _failed(folder: Path, error: Exception) -> UserError:
    """The line for a save that failed. What was saved before is untouched."""
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    return UserError(
        f"{folder} could not be written, {free >> 20} MiB are free there ({_reason(error)}); earlier "
        "checkpoints are as they were: make room (--keep-last 2 keeps two), then run the same command again"
    )


def _reason(error: Exception) -> str:
    """The innermost cause, in a few words."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    failures = getattr(error, "failures", {})
    causes = [str(cause) for cause, _ in failures.values()] or [type(error).__name__]
    return causes[0].splitlines()[0][:200]
