"""What a student learns from a dense teacher's hidden states: a distance at matched layers, on any stage.

Owns the distance of one microbatch and how it joins the backward pass. The decoder calls `after_layer`;
training/teacher_supply.py fills the targets and reports the sum. Axis letters: s rows, b batch, H hidden.
"""

import torch
from torch import Tensor

from megatron_clsa.distill.kd_loss import carry_loss
from megatron_clsa.parallel.context import split_rows


class HiddenMatch:
    """One microbatch's matched layers of one model chunk.

    Args:
        targets: student layer (from 1) -> `[b, s/cp, H]`, the teacher's states of the same rows.
        loss_mask: `[b, s/cp]`, the rows that count.
        coefficient: of each layer's distance.
        config: the student's, for the optimizer's loss scale.
        tp_group: its ranks hold the rows of hidden states in shares (sequence parallelism).

    Attributes:
        distance_sum: fp32 scalar, sum of the distances of this rank's rows and layers.
    """

    def __init__(self, targets: dict[int, Tensor], loss_mask: Tensor, coefficient: float, config, tp_group):
        self.targets, self.coefficient = targets, coefficient
        self.config, self.tp_group = config, tp_group
        self.mask = self._share(loss_mask)
        self.distance_sum = torch.zeros((), device=loss_mask.device)

    def after_layer(self, number: int, hidden: Tensor) -> Tensor:
        """`[s/cp/tp, b, H]` of layer `number` (from 1), with the distance hung on it if that is matched."""
        if number not in self.targets:
            return hidden
        rows = normalised_distance(hidden, self._share(self.targets[number]))
        total = (rows * self.mask).sum()
        self.distance_sum += total.detach()
        return carry_loss(hidden, total, self.coefficient, self.config)

    def _share(self, x: Tensor) -> Tensor:
        """`[b, s/cp, ...]` to this rank's `[s/cp/tp, b, ...]`."""
        return split_rows(x.transpose(0, 1), self.tp_group)


def normalised_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """`[...]`: mean squared difference of two `[..., H]` states, each divided by its root mean square."""
    one, other = (
        x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6) for x in (student, teacher)
    )
    return (one - other).pow(2).mean(-1)
