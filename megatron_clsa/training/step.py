"""One microbatch of training: read a batch, run the stage, return the loss that Megatron's schedules expect.

Owns no reduction over ranks or microbatches: `megatron.training` adds up what the loss returns, over data-
and context-parallel ranks, and divides once by the token count. Evaluation is in evaluation.py.
"""

from functools import partial

import torch
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_clsa.config import CLSAConfig
from megatron_clsa.data.provider import get_batch
from megatron_clsa.model.forward_mode import ForwardMode, ForwardReport
from megatron_clsa.training.evaluation import Evaluation, run_stage
from megatron_clsa.training.straggler import Stopwatch
from megatron_clsa.training.teacher_flags import TeacherSettings


class TrainingStep:
    """Megatron's `forward_step_func`; batches of an evaluation go to `evaluation`.

    Under a teacher, training batches come ready from `TeacherSupply`, with its targets on the last stage.
    `forward` and `data` measure a rank's own work for the report of slow ranks.
    """

    def __init__(self, config: CLSAConfig, evaluation: Evaluation, teacher: TeacherSettings | None = None):
        self.config, self.evaluation, self.teacher = config, evaluation, teacher
        self.forward, self.data = Stopwatch(), Stopwatch()
        self.losses: list[Tensor] = []  # (sum, count) of each microbatch of the current step

    def take_loss(self) -> Tensor:
        """`[2]` float64 on CPU: sum and count of this rank's losses since the last call, or zeros."""
        taken, self.losses = self.losses, []
        return torch.stack(taken).double().sum(0).cpu() if taken else torch.zeros(2, dtype=torch.float64)

    def __call__(self, data_iterator, model):
        if not model.training:
            return self.evaluation.forward_step(data_iterator, model)
        with self.forward:
            return self._forward(data_iterator, model)

    def _forward(self, data_iterator, model):
        if self.teacher is not None:
            return self._with_teacher(next(data_iterator), model)
        with self.data:
            batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
        mode = ForwardMode.from_config(self.config, training=True)
        return run_stage(model, batch, mode), partial(self._loss, batch["loss_mask"], mode.report)

    def _loss(self, loss_mask: Tensor, report: ForwardReport, losses: Tensor) -> tuple[Tensor, Tensor, dict]:
        total, count, figures = loss_parts(loss_mask, report, losses)
        self.losses.append(figures["lm loss"])
        return total, count, figures

    def _with_teacher(self, batch: dict, model):
        """The matched hidden states join the backward pass inside the model, on any stage."""
        mode = ForwardMode.from_config(
            self.config, training=True, teacher=batch.get("teacher"), hidden=batch.get("hidden")
        )
        return run_stage(model, batch, mode), partial(self._teacher_loss, batch["loss_mask"], mode)

    def _teacher_loss(self, loss_mask: Tensor, mode: ForwardMode, losses: Tensor):
        """`loss_parts` with the language-model loss reweighted and the KL to the teacher added."""
        settings = self.teacher
        total, count, figures = self._loss(loss_mask, mode.report, losses)
        kl = (mode.report.teacher_kl * loss_mask).sum()
        figures["teacher_kl"] = torch.stack([kl.detach(), count.float()])
        total = settings.lm_coeff * total + settings.loss_coeff * settings.spec.temperature**2 * kl
        return total, count, figures


def loss_parts(loss_mask: Tensor, report: ForwardReport, losses: Tensor) -> tuple[Tensor, Tensor, dict]:
    """(sum of losses to differentiate, number of tokens, figures as (sum, count) pairs).

    Args:
        loss_mask, losses: `[b, s/cp]`; only the last stage gets here.
    """
    total = (losses.float() * loss_mask).sum()
    count = loss_mask.sum().to(torch.int)
    figures = {"lm loss": torch.stack([total.detach(), count.float()])}
    if report.kd_loss_sum is not None:
        figures["kd loss"] = torch.stack([report.kd_loss_sum.float(), count.float()])
    return total, count, figures
