"""Where a phase starts from: its own newest checkpoint, an earlier phase's last one, or nothing.

Owns that choice, the carrying of optimizer moments into a phase, and the refusal of another architecture.
Reading and writing the files themselves is megatron.training's.
"""

from dataclasses import dataclass
from pathlib import Path

from megatron.training import get_args

from megatron_clsa.errors import UserError
from megatron_clsa.parallel.cpu import param_groups_of_any_schedule

TRACKER = "latest_checkpointed_iteration.txt"


def newest_step(folder: Path) -> int | None:
    """The step of a folder's newest complete checkpoint, None without one."""
    tracker = folder / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text().strip()
    if not text.isdigit():
        raise UserError(f"{tracker} holds {text!r} instead of a step: write the newest complete step into it")
    return int(text)


@dataclass(frozen=True)
class Origin:
    """What a phase loads.

    Attributes:
        folder: checkpoint folder, None for fresh weights.
        step: of the phase itself to go on from; 0 enters the phase.
        moments: on entering, whether the optimizer's moments come along. They do if the same parameters
            train: a moment of a parameter that was frozen says nothing.
    """

    folder: Path | None
    step: int = 0
    moments: bool = False

    def apply(self, args, own: Path) -> None:
        """Set Megatron's flags: save to `own`, load from here."""
        args.save = str(own)
        args.load = args.pretrained_checkpoint = None
        if self.folder is None:
            return
        args.load = str(self.folder)
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
