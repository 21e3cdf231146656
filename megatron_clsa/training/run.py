"""Runs the phases of a plan, one `megatron.training.pretrain` each, in one process a rank.

Owns the order of things around pretrain and the exit code. Between phases the process group and Megatron's
globals are torn down and built again on the launcher's one store, under a prefix a phase: nothing depends on
how the ranks were started (torchrun or srun), and a test holds a run that is cut and
started again in a new process bitwise equal to one that never stopped. Entering a phase always goes
through the checkpoint of the one before.
"""

import errno
import os
import signal
import socket
import sys
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.global_vars import get_signal_handler, get_tokenizer, set_global_variables
from megatron.training.training import destroy_global_state

from megatron_clsa.convert.architecture import Architecture, check_same_architecture, read_architecture
from megatron_clsa.convert.dist_index import load_index
from megatron_clsa.data.provider import train_valid_test_datasets_provider
from megatron_clsa.errors import UserError, say
from megatron_clsa.model.builder import CLSAModelConfig
from megatron_clsa.parallel.checkpoint_io import refuse_pickles
from megatron_clsa.parallel.cpu import patch_training, wrap_save, wrap_training
from megatron_clsa.training.arguments import parse_command
from megatron_clsa.training.checkpoint import Loader, Origin, load_moments, newest_step
from megatron_clsa.training.dry_run import dry_run, run_shape
from megatron_clsa.training.durable import save_durably
from megatron_clsa.training.evaluation import Evaluation, evaluate_on_entry
from megatron_clsa.training.guards import Guard, GuardSettings, RollBack
from megatron_clsa.training.metrics import MetricsFile, StepRecorder
from megatron_clsa.training.plan import PhaseRun, RunPlan, check_gate, check_origin, make_plan
from megatron_clsa.training.progress import (
    Progress,
    Throughput,
    close_writers,
    nothing,
    place_writers,
    without_megatrons_line,
)
from megatron_clsa.training.recipe import load_recipe
from megatron_clsa.training.release import free_last_phase, remember_chunks
from megatron_clsa.training.run_lock import one_writer
from megatron_clsa.training.step import TrainingStep
from megatron_clsa.training.straggler import StragglerReport
from megatron_clsa.training.teacher_flags import TeacherSettings
from megatron_clsa.training.teacher_supply import TeacherSupply
from megatron_clsa.training.watchdog import Watchdog, memory_advice

EXIT_DONE, EXIT_FAILED, EXIT_SAVED = 0, 1, 75
# Of the run's folder, what the same command will meet again; a network file system's errors may pass.
HOPELESS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EISDIR, errno.ENOTDIR, errno.EEXIST,
}  # fmt: skip


def main(words: list[str]) -> int:
    """Everything that `examples/distill.py` does. Returns the exit code; bad input raises `UserError`."""
    command = parse_command(words)
    recipe = load_recipe(command.config)
    if command.dry_run is not None:
        return dry_run(recipe, command, words)
    plan = make_plan(recipe, command, words)
    for run in plan.runs[:1]:
        check_gate(run, plan.state, plan.ignore_gate)
        check_origin(run.origin(plan.state, plan.checkpoints), run)
    make_folder(plan)
    return run_phases(plan)


def make_folder(plan: RunPlan) -> None:
    """The run's folder, on every rank: one that cannot be written is found before ranks meet."""
    try:
        plan.checkpoints.mkdir(parents=True, exist_ok=True)
        writable = os.access(plan.out, os.W_OK) and os.access(plan.checkpoints, os.W_OK)
        reason = None if writable else "no permission to write"
    except OSError as error:
        reason = f"{error.strerror} ({error.filename})"
    if reason:
        raise UserError(f"--out {plan.out}: {reason}; name a folder that you may write to")


def run_phases(plan: RunPlan) -> int:
    """Run what the plan holds; stops after a phase that was left early."""
    patch_training()
    refuse_pickles(load_index)
    wrap_save(save_durably)
    # Slurm warns with USR1 before the time limit, preemption sends TERM: save and leave on both.
    signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    if not plan.runs:
        if os.environ.get("RANK", "0") == "0":
            print(f"{plan.out}: every phase that was asked for is complete")
        return EXIT_DONE
    store, args = launcher_store(), plan.runs[0].args
    with one_writer(plan.out, store, args.rank, args.world_size):
        try:
            return _run_in_turn(plan, store)
        except OSError as error:
            if error.errno not in HOPELESS:
                raise
            where = f" ({error.filename})" if error.filename else ""
            raise UserError(
                f"--out {plan.out}: {error.strerror}{where}; mend that, then run it again"
            ) from error


def _run_in_turn(plan: RunPlan, store: dist.Store) -> int:
    for number, run in enumerate(plan.runs):
        check_gate(run, plan.state, plan.ignore_gate)
        figures = run_phase(run, plan, dist.PrefixStore(f"phase{number}", store))
        if figures is None:
            return EXIT_SAVED
        plan.state.finish(run.phase.name, _record(run, figures), write=run.args.rank == 0)
    return EXIT_DONE


def launcher_store() -> dist.Store:
    """The key-value store that torchrun's or srun's environment names; a lone process makes its own."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    store, _, _ = next(iter(dist.rendezvous("env://")))
    return store


def run_phase(run: PhaseRun, plan: RunPlan, store: dist.Store) -> dict | None:
    """Train one phase to its end, again from its newest checkpoint after each roll back.

    Returns:
        Its last figures, None if it saved and left early (a signal).
    """
    bad_steps: list[int] = []
    while True:
        attempt = replace(run, args=deepcopy(run.args), config=deepcopy(run.config))
        attempt.args.iterations_to_skip = [*run.args.iterations_to_skip, *bad_steps]
        try:
            return _run_once(attempt, plan, dist.PrefixStore(f"attempt{len(bad_steps)}", store), bad_steps)
        except RollBack:
            continue


def _run_once(run: PhaseRun, plan: RunPlan, store: dist.Store, bad_steps: list[int]) -> dict | None:
    free_last_phase()
    loader = Loader(store, run.args.rank, run.args.world_size, plan.checkpoints)
    origin = run.origin(plan.state, plan.checkpoints, loader.newest)
    origin.apply(run.args, run.folder)
    place_writers(run.args, run.phase.folder, str(plan.out))
    file = MetricsFile(plan.metrics, Progress(run.steps, run.args.log_interval))
    if run.args.rank == run.args.world_size - 1:
        file.truncate(run.position.at(origin.step))
    wrap_training("setup_model_and_optimizer", remember_chunks)
    wrap_training("train", evaluate_on_entry)
    wrap_training("load_checkpoint", load_moments if origin.moments else None)
    watchdog = Watchdog(store, run.args.rank, run.args.world_size, run.args.hang_timeout)
    watchdog.start()
    try:
        _announce(run, origin)
        set_global_variables(run.args)
        _record_architecture(run, origin)
        teacher = TeacherSettings.of(get_args(), get_tokenizer().vocab_size)
        supply = TeacherSupply(teacher) if teacher else None
        evaluation = Evaluation(run.config, file, run.position, supply)
        step = TrainingStep(run.config, evaluation, teacher)
        guard = Guard(GuardSettings.of(run.args), step, run.steps, bad_steps)
        slow = StragglerReport(store, run.args.rank, run.args.straggler_factor, step.forward, step.data)
        _watch(run, file, guard, supply, watchdog, slow)
        _pretrain(run, step, evaluation, store)
        # A signal that came after the last step's check: the phase is complete, the run is not.
        stopped = any(get_signal_handler().signals_received())
        if stopped:
            plan.state.finish(run.phase.name, _record(run, evaluation.last), write=run.args.rank == 0)
        return None if stopped else evaluation.last
    except SystemExit as left:
        # Megatron also leaves with code 0 for lack of what it wanted to load; then nothing was saved.
        if left.code not in (None, 0) or newest_step(run.folder) is None:
            raise SystemExit(left.code or EXIT_FAILED) from None
        return None
    except torch.OutOfMemoryError as error:
        say(memory_advice(error, run.args.rank))
        raise SystemExit(EXIT_FAILED) from None
    finally:
        watchdog.stop()
        _tear_down()


def _watch(
    run: PhaseRun,
    file: MetricsFile,
    guard: Guard,
    supply: TeacherSupply | None,
    watchdog: Watchdog,
    slow: StragglerReport,
):
    """Stand around the parts of Megatron's loop that train a step and tell of it."""
    throughput = Throughput(run_shape(get_args(), run.config), run.args.peak_tflops)
    recorder = StepRecorder(file, run.position, throughput.mfu, guard.watch_gradient)

    def train_step(original, *args, **named):
        watchdog.beat(get_args().curr_iteration)
        taken = guard(partial(supply, original) if supply else original, *args, **named)
        slow.after_step(get_args().curr_iteration + 1)
        return taken

    wrap_training("train_step", train_step)
    wrap_training("training_log", recorder)
    wrap_training("print_rank_last", without_megatrons_line)
    wrap_training("report_theoretical_memory", nothing)


def _record_architecture(run: PhaseRun, origin: Origin):
    """Refuse weights of another model, now with the tokenizer known; say beside ours what they are."""
    args = get_args()
    architecture = Architecture.of(
        run.config,
        vocab_size=get_tokenizer().vocab_size,
        tie_embeddings=not args.untie_embeddings_and_output_weights,
        max_position_embeddings=args.max_position_embeddings,
        tokenizer_type=args.tokenizer_type,
        tokenizer_model=str(Path(args.tokenizer_model).resolve()) if args.tokenizer_model else None,
    )
    if origin.folder is not None:
        check_same_architecture(read_architecture(origin.folder), asdict(architecture), origin.folder)
    if args.rank == 0:
        architecture.write(run.folder)


def _pretrain(run: PhaseRun, step: TrainingStep, evaluation: Evaluation, store: dist.Store):
    args = get_args()
    model = CLSAModelConfig(
        transformer=run.config,
        vocab_size=args.padded_vocab_size,
        seq_length=args.max_position_embeddings,
        tie_embeddings=not args.untie_embeddings_and_output_weights,
        transformer_impl=args.transformer_impl,
        seed=args.seed,
    )
    pretrain(
        pretrain_cfg_container_from_args(args, model),
        _without_test_set,
        ModelType.encoder_or_decoder,
        step,
        non_loss_data_func=evaluation.finish,
        store=store,
    )


def _without_test_set(num_samples: list[int], vp_stage: int | None = None):
    """Training and validation data; a test set is for when training is over."""
    get_args().consumed_valid_samples = 0  # every evaluation sees the same sequences, after a resume too
    train, valid, _ = train_valid_test_datasets_provider(num_samples, vp_stage)
    return train, valid, None


_without_test_set.is_distributed = True


def _record(run: PhaseRun, figures: dict) -> dict:
    return {
        "folder": run.phase.folder,
        "trainable": run.config.trainable,
        "steps": run.steps,
        "tokens": run.steps * run.position.tokens_per_step,
        "cross_attention": run.config.cross_attention,
        **{name: getattr(run.args, name) for name in ("seq_length", "global_batch_size", "lr")},
        **{name: figures.get(name) for name in ("valid_lm_loss", "attention_coverage", "oracle_coverage")},
    }


def _announce(run: PhaseRun, origin: Origin):
    if run.args.rank:
        return
    source = Path(origin.folder).name if origin.folder else "fresh weights"
    how = f"resuming at step {origin.step}" if origin.step else f"from {source}"
    moments = " with optimizer moments" if origin.moments else ""
    length = f"{run.steps} steps of {run.args.seq_length} tokens a sequence"
    say(f"phase {run.phase.number} {run.phase.name}: {length}, {how}{moments}", sys.stdout)


def _tear_down():
    """Close what a phase opened; `free_last_phase` frees its tensors once its frames are gone."""
    close_writers()
    destroy_global_state()
    if dist.is_initialized():
        dist.destroy_process_group()
