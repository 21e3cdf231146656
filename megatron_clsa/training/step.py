"""One microbatch of training: read a batch, run the stage, return the loss that Megatron's schedules expect.

Owns no reduction over ranks or microbatches: `megatron.training` adds up what `loss_parts` returns, over
data- and context-parallel ranks, and divides once by the token count. Evaluation is in evaluation.py.
"""

from functools import partial

import torch
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_clsa.config import CLSAConfig
from megatron_clsa.data.provider import get_batch
from megatron_clsa.model.forward_mode import ForwardMode, ForwardReport
from megatron_clsa.training.evaluation import Evaluation, run_stage


class TrainingStep:
    """Megatron's `forward_step_func`; batches of an evaluation go to `evaluation`."""

    def __init__(self, config: CLSAConfig, evaluation: Evaluation):
        self.config, self.evaluation = config, evaluation

    def __call__(self, data_iterator, model):
        if not model.training:
            return self.evaluation.forward_step(data_iterator, model)
        batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
        mode = ForwardMode.from_config(self.config, training=True)
        return run_stage(model, batch, mode), partial(loss_parts, batch["loss_mask"], mode.report)


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
