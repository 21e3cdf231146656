"""Where a phase starts from: its own newest checkpoint, an earlier phase's last one, or nothing.

Owns that choice, the checks before a load, the carrying of optimizer moments into a phase, and the refusal
of another architecture. Reading and writing the files themselves is megatron.training's.
"""

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from megatron.training import get_args

from megatron_clsa.convert import manifest
from megatron_clsa.convert.checkpoint import TRACKER
from megatron_clsa.convert.dist_index import load_index
from megatron_clsa.errors import UserError, say
from megatron_clsa.parallel.cpu import param_groups_of_any_schedule


def newest_step(folder: Path) -> int | None:
    """The step of a folder's newest complete checkpoint, None without one. Checksums are left to a load."""
    steps = manifest.complete_steps(folder)
    return steps[0] if steps else None


class Loader:
    """Finds the newest checkpoint that can be trusted, the same on every rank.

    The ranks share the reading of checksums and tell each other through the launcher's store, because there
    is no process group yet when a phase is chosen.
    """

    def __init__(self, store: dist.Store, rank: int, ranks: int, own: Path):
        self.store, self.rank, self.ranks = store, rank, ranks
        self.own = own  # the run's checkpoints; only these are tidied up
        self.asked = 0  # folders so far; keeps the keys of one apart from another's

    def newest(self, folder: Path) -> int | None:
        """The step to load from a phase's folder, None if no save of it was ever complete.

        Says on rank 0 which checkpoints it skips and why.

        Raises:
            UserError: if there are checkpoints and none of them can be loaded.
        """
        self.asked += 1
        listed = self._from_rank_0("steps", lambda: " ".join(map(str, manifest.steps_in(folder))))
        faults: dict[int, str] = {}
        for step in map(int, listed.split()):
            fault = self._fault(manifest.step_folder(folder, step))
            if fault is None:
                self._from_rank_0("tidy", lambda step=step: self._tidy(folder, step, faults))
                return step
            faults[step] = fault
            self._say(f"checkpoint of step {step} skipped: {fault}")
        return self._without_any(folder, faults)

    def _without_any(self, folder: Path, faults: dict[int, str]) -> int | None:
        damaged = [step for step in faults if (manifest.step_folder(folder, step) / manifest.NAME).is_file()]
        if damaged:
            raise UserError(
                f"{folder}: no checkpoint can be loaded ({faults[damaged[0]]}); move the folder away"
            )
        if folder.parent != self.own and (folder / TRACKER).is_file():
            return self._named_by_tracker(folder)
        return None

    def _named_by_tracker(self, folder: Path) -> int | None:
        """Weights that were converted (`release`, no step) or that another program saved (no checksums)."""
        text = (folder / TRACKER).read_text(errors="replace").strip()
        if not text.isdigit() and text != "release":
            raise UserError(f"{folder / TRACKER} holds {text[:20]!r}: write the step to load into it")
        named = manifest.step_folder(folder, int(text)) if text.isdigit() else folder / text
        if (named / manifest.NAME).is_file():
            fault = self._fault(named)
        else:
            fault = _index_fault(named)
            self._say(f"{named} has no {manifest.NAME}: loading it without checksums")
        if fault:
            raise UserError(f"{fault}; give another checkpoint")
        return int(text) if text.isdigit() else None

    def _fault(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint, agreed on by all ranks; each reads its share of the files."""
        keys = [f"{self.asked}/{folder.name}/{rank}" for rank in range(self.ranks)]
        self.store.set(keys[self.rank], self._fault_in_share(folder) or "")
        answers = (self.store.get(key).decode() for key in keys)
        return self._from_rank_0(folder.name, lambda: next(filter(None, answers), None)) or None

    def _fault_in_share(self, folder: Path) -> str | None:
        try:
            files = sorted(manifest.read_manifest(folder).items())
        except UserError as error:
            return str(error)
        shares = files[self.rank :: self.ranks]
        faults = (manifest.file_fault(folder, name, record) for name, record in shares)
        fault = next(filter(None, faults), None)
        return fault or (_index_fault(folder) if self.rank == 0 else None)

    def _from_rank_0(self, key: str, answer: Callable[[], str | None]) -> str:
        key = f"{self.asked}/{key}"
        if self.rank == 0:
            self.store.set(key, answer() or "")
        return self.store.get(key).decode()

    def _tidy(self, folder: Path, chosen: int, faults: dict[int, str]) -> None:
        """Let the tracker name the choice, and nothing newer be in its way.

        Megatron ends with code 0 on a tracker that it cannot read. A damaged checkpoint is kept under
        another name, a save that was cut short is removed.
        """
        if folder.parent != self.own:
            return
        for step in faults:
            skipped = manifest.step_folder(folder, step)
            if (skipped / manifest.NAME).is_file():
                aside = skipped.with_name(f"damaged_{skipped.name}")
                manifest.discard(aside)
                os.replace(skipped, aside)
            else:
                manifest.discard(skipped)
        tracker = folder / TRACKER
        named = tracker.read_text(errors="replace").strip() if tracker.is_file() else "nothing"
        if named != str(chosen):
            self._say(f"{tracker} names {named[:20]!r}; the newest complete checkpoint is step {chosen}")
            manifest.write_whole(tracker, str(chosen))

    def _say(self, message: str) -> None:
        if self.rank == 0:
            say(message)


def _index_fault(folder: Path) -> str | None:
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            load_index(file)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    except pickle.UnpicklingError as error:
        return f"{path} is refused: {error}"
    return None


@dataclass(frozen=True)
class Origin:
    """What a phase loads.

    Attributes:
        folder: checkpoint folder, None for fresh weights.
        checkpoint: which step's checkpoint of that folder, None for the one that its tracker names.
        step: of the phase itself to go on from; 0 enters the phase.
        moments: on entering, whether the optimizer's moments come along. They do if the same parameters
            train: a moment of a parameter that was frozen says nothing.
    """

    folder: Path | None
    checkpoint: int | None = None
    step: int = 0
    moments: bool = False

    def apply(self, args, own: Path) -> None:
        """Set Megatron's flags: save to `own`, load from here."""
        args.save = str(own)
        args.load = args.pretrained_checkpoint = None
        if self.folder is None:
            return
        args.load = str(self.folder)
        args.ckpt_step = self.checkpoint
        args.finetune = self.step == 0 and not self.moments


def load_moments(load_checkpoint, model, optimizer, scheduler, *rest, **named) -> tuple[int, int]:
    """Around Megatron's `load_checkpoint`: weights and moments of an earlier phase, step 0 of this one.

    Upstream either restores everything, schedule and data position included, or (`--finetune`) drops the
    moments as well.
    """
    args = get_args()
    with param_groups_of_any_schedule():
        load_checkpoint(model, optimizer, None, *rest, **named)
    for group in optimizer.param_groups:
        group["max_lr"], group["min_lr"] = args.lr, args.min_lr
    scheduler.step(increment=0)
    args.consumed_train_samples = args.skipped_train_samples = args.consumed_valid_samples = 0
    return 0, 0
