"""What a validation pass measures beside the loss: coverage of the index, and the other attention's loss.

Owns keeping a phase's validation batches, probing them and running them again with dense (or sparse)
cross-attention, and for the KL to a teacher. All evaluations of a phase see the same batches, the first
before its first step, so that two losses differ by the training, or the attention, alone. What a figure
means: distill/probe.py.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args
from megatron.training.training import (
    disable_forward_pre_hook,
    enable_forward_pre_hook,
    evaluate_and_print_results,
    should_disable_forward_pre_hook,
)
from megatron.training.utils import is_last_rank
from torch import Tensor

from megatron_clsa.config import CLSAConfig
from megatron_clsa.data.provider import get_batch
from megatron_clsa.distill.probe import AttentionProbe
from megatron_clsa.model.forward_mode import ForwardMode
from megatron_clsa.training.metrics import MetricsFile, PhasePosition
from megatron_clsa.training.teacher_supply import TeacherSupply

PROBED_ROWS = 16  # sampled positions a sequence; a probe holds [b, rows, s] sums


def run_stage(model, batch: dict, mode: ForwardMode) -> Tensor:
    """This stage's packet or, on the last stage, the losses `[b, s/cp]`."""
    return model(
        batch["tokens"],
        batch["position_ids"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        mode=mode,
    )


class Evaluation:
    """Collects one evaluation at a time and appends its line to the metrics file.

    Args:
        supply: of the phase's teacher; None without one.
    """

    def __init__(
        self,
        config: CLSAConfig,
        file: MetricsFile,
        position: PhasePosition,
        supply: TeacherSupply | None = None,
    ):
        self.config, self.file, self.position, self.supply = config, file, position, supply
        self.last: dict[
            str, float
        ] = {}  # figures of the newest evaluation, the same on every rank but the losses
        self.batches: dict[int | None, list[dict]] = {}  # by virtual pipeline stage, kept for the phase
        self._start()

    def _start(self):
        self.taken: dict[int | None, int] = {}  # microbatches of the current evaluation so far
        self.probes: list[AttentionProbe] = []
        self.totals = torch.zeros(2, dtype=torch.float64)

    def forward_step(self, data_iterator, model):
        """One microbatch of Megatron's evaluation: with the phase's own attention, and a probe."""
        stage = get_attr_wrapped_model(model, "vp_stage")
        kept, number = self.batches.setdefault(stage, []), self.taken.get(stage, 0)
        if number == len(kept):
            kept.append(get_batch(data_iterator, stage))
        self.taken[stage] = number + 1
        mode = ForwardMode(self.config.cross_attention, probe=self._probe(number, model))
        return self._forward(kept[number], model, mode)

    def _probe(self, microbatch: int, model) -> AttentionProbe:
        """One probe a microbatch, shared by the model chunks of this rank."""
        if microbatch == len(self.probes):
            args, groups = get_args(), get_attr_wrapped_model(model, "pg_collection")
            device = torch.cuda.current_device()
            self.probes.append(
                AttentionProbe(
                    self.config, args.eval_micro_batch_size, args.seq_length, PROBED_ROWS, device, groups
                )
            )
        return self.probes[microbatch]

    def _forward(self, batch: dict, model, mode: ForwardMode):
        return run_stage(model, batch, mode), partial(self._loss, batch["loss_mask"], mode)

    def _loss(self, loss_mask: Tensor, mode: ForwardMode, losses: Tensor):
        """Adds to the totals the language-model loss, or the KL where a teacher's targets were given."""
        losses = losses if mode.teacher is None else mode.report.teacher_kl
        total, count = (losses.float() * loss_mask).sum(), loss_mask.sum()
        self.totals += torch.stack([total, count]).double().cpu()
        return total, count.to(torch.int), {"lm loss": torch.stack([total, count.float()])}

    def finish(self, model: list) -> None:
        """Megatron's `non_loss_data_func`: every rank comes here once, after an evaluation's last batch."""
        args = get_args()
        groups = get_attr_wrapped_model(model[0], "pg_collection")
        figures = {"valid_lm_loss": self._mean_loss(groups)}
        figures |= self._losses_by_attention(model, groups, figures["valid_lm_loss"])
        if self.supply is not None:
            figures["valid_teacher_kl"] = self._teacher_kl(model, groups)
        parts = [probe.finish() for probe in self.probes]
        figures |= {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}
        self.last = figures
        self._start()
        step = args.curr_iteration + 1
        if is_last_rank():
            self.file.append(self.position.at(step) | figures)
        if step >= args.train_iters:
            args.do_valid = False  # pretrain would evaluate the last step a second time

    def _mean_loss(self, groups) -> float | None:
        totals, self.totals = self.totals.to(torch.cuda.current_device()), torch.zeros(2, dtype=torch.float64)
        dist.all_reduce(totals, group=groups.dp_cp)
        return (totals[0] / totals[1]).item() if totals[1] else None

    def _losses_by_attention(self, model: list, groups, own: float | None) -> dict:
        """The loss with either attention on the same batches, once there is an index worth comparing."""
        if not self.config.needs_index_projection:
            return {}
        other = "sparse" if self.config.cross_attention == "dense" else "dense"
        self._replay(model, self._kept(model), lambda batch: ForwardMode(other))
        return {
            f"valid_lm_loss_{self.config.cross_attention}": own,
            f"valid_lm_loss_{other}": self._mean_loss(groups),
        }

    def _teacher_kl(self, model: list, groups) -> float | None:
        """KL to the teacher with the phase's attention. Its targets exist for one iteration at a time."""
        kept = self._kept(model)
        microbatches = len(kept[0]) // get_args().eval_iters
        for first in range(0, len(kept[0]), microbatches):
            part = self.supply.with_targets([chunk[first : first + microbatches] for chunk in kept])
            self._replay(model, part, self._with_teacher)
        return self._mean_loss(groups)

    def _with_teacher(self, batch: dict) -> ForwardMode:
        return ForwardMode(self.config.cross_attention, teacher=batch.get("teacher"))

    def _kept(self, model: list) -> list[list[dict]]:
        return [self.batches[get_attr_wrapped_model(chunk, "vp_stage")] for chunk in model]

    def _replay(self, model: list, batches: list[list[dict]], mode_of: Callable[[dict], ForwardMode]) -> None:
        """Batches of each model chunk once more, through the same pipeline schedule."""
        args = get_args()
        replays = [iter(part) for part in batches]

        def forward_step(batches, chunk):
            batch = next(batches)
            return self._forward(batch, chunk, mode_of(batch))

        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=replays if len(replays) > 1 else replays[0],
            model=model,
            num_microbatches=len(batches[0]),
            seq_length=args.seq_length,
            micro_batch_size=args.eval_micro_batch_size,
            forward_only=True,
        )


def evaluate_on_entry(
    train, forward_step, model, optimizer, scheduler, data, valid_data, other, config, *rest, **named
):
    """Around Megatron's `train`: evaluate before a phase's first step. Upstream begins after some steps."""
    args = get_args()
    if args.do_valid and args.iteration == 0:
        args.curr_iteration = -1
        hooked = should_disable_forward_pre_hook(args)
        if hooked:
            disable_forward_pre_hook(model, optimizer=optimizer)
        evaluate_and_print_results(
            "iteration 0",
            forward_step,
            valid_data,
            model,
            0,
            other,
            config,
            non_loss_data_func=rest[1],
            **named,
        )
        if hooked:
            enable_forward_pre_hook(model)
    return train(forward_step, model, optimizer, scheduler, data, valid_data, other, config, *rest, **named)
