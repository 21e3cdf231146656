"""Which phases a run still has to take, from where, and whether it may.

Recipe, flags and OUT/run.json together. Owns the run's state file and the coverage gate. Trains nothing.
"""

import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from megatron_clsa.config import CLSAConfig
from megatron_clsa.convert.architecture import Architecture, check_same_architecture, read_architecture
from megatron_clsa.convert.checkpoint import TRACKER
from megatron_clsa.errors import UserError, say
from megatron_clsa.training.arguments import check_recipe, parse_phase
from megatron_clsa.training.checkpoint import Origin, newest_step
from megatron_clsa.training.metrics import PhasePosition
from megatron_clsa.training.recipe import Phase, Recipe
from megatron_clsa.training.validation import validate_phase

_RECORDED = {"folder", "trainable", "steps", "tokens"}  # of a complete phase, at least
Newest = Callable[[Path], int | None]


class RunState:
    """OUT/run.json: the complete phases with their steps, tokens and last figures, keyed by name."""

    def __init__(self, path: Path | None):
        self.path = path
        self.complete: dict[str, dict] = {}
        if path is not None and path.is_file():
            try:
                self.complete = json.loads(path.read_text())["complete"]
                for phase, record in self.complete.items():
                    if not isinstance(record, dict) or not record.keys() >= _RECORDED:
                        raise ValueError(f"phase {phase}")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{path} is damaged ({error}): delete it, phases go on from their checkpoints"
                ) from None

    def finish(self, name: str, record: dict, write: bool):
        """Note a phase as complete; one rank writes."""
        self.complete[name] = record
        if write:
            whole = self.path.with_suffix(".tmp")
            whole.write_text(json.dumps({"complete": self.complete}, indent=1) + "\n")
            whole.replace(self.path)


@dataclass
class PhaseRun:
    """A phase that is still to be run, with everything it needs."""

    phase: Phase
    args: Namespace
    config: CLSAConfig
    folder: Path
    position: PhasePosition
    previous: str | None

    @property
    def steps(self) -> int:
        return self.args.train_iters

    def origin(self, state: RunState, checkpoints: Path, newest: Newest = newest_step) -> Origin:
        """Its own newest checkpoint or, on entering, the previous phase's last.

        Args:
            newest: which step to load from a folder, None if there is none.
        """
        step = newest(self.folder)
        if step is not None:
            return Origin(self.folder, step, step)
        if self.previous is None:
            start = Path(self.args.pretrained_checkpoint) if self.args.pretrained_checkpoint else None
            return Origin(start, newest(start) if start else None)
        done = state.complete[self.previous]
        folder = checkpoints / done["folder"]
        return Origin(folder, newest(folder), moments=done["trainable"] == self.config.trainable)


@dataclass
class RunPlan:
    """All of a command: the folder, the state and the phases to run, in order."""

    out: Path
    state: RunState
    runs: list[PhaseRun]
    ignore_gate: bool

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.out / "metrics.jsonl"


def make_plan(recipe: Recipe, command: Namespace, words: list[str], ranks: int | None = None) -> RunPlan:
    """Parse and validate every phase that is to run, and place it in the run.

    Args:
        command: the run's own flags.
        words: the whole command line, which overrides the recipe.
    """
    out = Path(command.out or Path("runs") / recipe.path.stem)
    state = RunState(out / "run.json" if command.dry_run is None else None)
    plan = RunPlan(out, state, [], command.ignore_coverage_gate)
    chosen = recipe.choose(command.phases)
    check_recipe(recipe)
    step = tokens = 0
    previous = None
    for phase in recipe.phases:
        done = plan.state.complete.get(phase.name)
        if done is None and phase not in chosen:
            continue
        if done is None:
            args = parse_phase(recipe, phase, words, ranks)
            config = validate_phase(args, phase.name)
            size = args.global_batch_size * args.seq_length
            position = PhasePosition(phase.name, step, tokens, size)
            plan.runs.append(
                PhaseRun(phase, args, config, plan.checkpoints / phase.folder, position, previous)
            )
            done = {"steps": args.train_iters, "tokens": args.train_iters * size}
        step, tokens, previous = step + done["steps"], tokens + done["tokens"], phase.name
    return plan


def check_gate(run: PhaseRun, state: RunState, ignore: bool) -> None:
    """Refuse to enter a phase whose index covers too little of the attention.

    Raises:
        UserError: unless `ignore`, which warns instead.
    """
    wanted = run.phase.minimum_coverage
    if wanted is None or newest_step(run.folder) is not None:
        return
    figures = state.complete.get(run.previous, {}) if run.previous else {}
    covered, best = figures.get("attention_coverage"), figures.get("oracle_coverage")
    ratio = covered / best if covered is not None and best else None
    if ratio is not None and ratio >= wanted:
        return
    found = "was never measured" if ratio is None else f"is {ratio:.3f} of the oracle's"
    message = f"phase {run.phase.name}: coverage {found}, the recipe asks for minimum_coverage {wanted}"
    if not ignore:
        raise UserError(f"{message}: train the indexer longer, or pass --ignore-coverage-gate")
    if run.args.rank == 0:
        say(f"WARNING: {message}; entering it all the same (--ignore-coverage-gate)")


def check_origin(origin: Origin, run: PhaseRun) -> None:
    """Refuse a checkpoint of another architecture, or none at all, before anything is started.

    Raises:
        UserError: naming the field that differs; also if the folder holds no CLSA checkpoint, from which
            Megatron would go on with fresh weights.
    """
    if origin.folder is None:
        return
    config = run.config
    wanted = {f.name: getattr(config, f.name) for f in fields(Architecture) if hasattr(config, f.name)}
    wanted["tie_embeddings"] = not run.args.untie_embeddings_and_output_weights
    wanted["vocab_size"] = run.args.tokenizer_vocab_size  # Megatron loads an embedding of any height
    check_same_architecture(read_architecture(origin.folder), wanted, origin.folder)
    if origin.checkpoint is None and not (origin.folder / TRACKER).is_file():
        raise UserError(f"{origin.folder} holds no complete checkpoint: copy it again or name another folder")
