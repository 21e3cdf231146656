"""What a student learns from a dense teacher: the KL of the top K and the rest, and matched hidden states.

Owns the two losses of one microbatch; where the targets come from is teacher.py's. Axis letters: s rows, b
batch, V vocabulary, K the teacher's kept tokens, H hidden.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_clsa.parallel.context import split_rows

ROWS_AT_ONCE = 1024  # fp32 copies of the logits live for a block of rows only, forward and backward
SMALLEST = 1e-10  # probability of the student's rest, which fp32 differences can round to nothing


@dataclass(frozen=True)
class TeacherTargets:
    """A teacher's view of one microbatch.

    Attributes:
        ids: `[b, s/cp, K]` int32, its likeliest tokens.
        log_probs: `[b, s/cp, K]` fp32 at `temperature`, over its whole vocabulary.
        temperature: of both distributions.
        hidden: student layer (from 1) -> `[b, s/cp, H]`, the teacher's state to match.
    """

    ids: Tensor
    log_probs: Tensor
    temperature: float = 1.0
    hidden: dict[int, Tensor] = field(default_factory=dict)


def teacher_kl(logits: Tensor, targets: TeacherTargets, tp_group) -> Tensor:
    """`[b, s]` fp32 KL(teacher || student) over the teacher's K tokens and the rest as one outcome.

    Args:
        logits: `[s, b, V/tp]`, this rank's shard of the vocabulary.
    """
    ids, log_probs = (x.transpose(0, 1) for x in (targets.ids.long(), targets.log_probs))
    blocks = zip(*(x.split(ROWS_AT_ONCE) for x in (logits, ids, log_probs)), strict=True)
    rows = [
        checkpoint(_kl_rows, *block, targets.temperature, tp_group, use_reentrant=False) for block in blocks
    ]
    return torch.cat(rows).transpose(0, 1)


def _kl_rows(logits: Tensor, ids: Tensor, log_p: Tensor, temperature: float, tp_group) -> Tensor:
    scaled = logits.float() / temperature
    log_q = _gather_vocabulary(scaled, ids, tp_group) - _log_sum_exp(scaled, tp_group)[..., None]
    rest_p = (1 - log_p.exp().sum(-1)).clamp(min=0)
    rest_q = (1 - log_q.exp().sum(-1)).clamp(min=SMALLEST)
    kept = (log_p.exp() * (log_p - log_q)).sum(-1)
    return kept + torch.xlogy(rest_p, rest_p) - rest_p * rest_q.log()


def _log_sum_exp(x: Tensor, tp_group) -> Tensor:
    """Over the last axis, which tensor-parallel ranks share out."""
    top = x.detach().amax(-1)
    if tp_group.size() > 1:
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=tp_group)
    total = (x - top[..., None]).exp().sum(-1)
    return top + _sum_over_shards(total, tp_group).log()


def _gather_vocabulary(x: Tensor, ids: Tensor, tp_group) -> Tensor:
    """`x[..., ids]` where ids count over the shards of all ranks."""
    local = ids - tp_group.rank() * x.size(-1)
    mine = (local >= 0) & (local < x.size(-1))
    found = x.gather(-1, local.clamp(0, x.size(-1) - 1)).masked_fill(~mine, 0.0)
    return _sum_over_shards(found, tp_group)


def _sum_over_shards(x: Tensor, tp_group) -> Tensor:
    """All-reduce whose gradient is the identity: what follows is the same on every rank."""
    return x if tp_group.size() == 1 else reduce_from_tensor_model_parallel_region(x, group=tp_group)


class HiddenMatch(AbstractContextManager):
    """Collects the distance of student layers to their targets during one forward pass.

    Args:
        decoder: the model's CLSADecoder, all layers on this rank.
        targets: student layer (from 1) -> `[b, s/cp, H]`.
        loss_mask: `[b, s/cp]`, the rows that count.
        tp_group: its ranks hold the rows of hidden states in shares (sequence parallelism).
    """

    def __init__(self, decoder, targets: dict[int, Tensor], loss_mask: Tensor, tp_group):
        self.decoder, self.targets, self.tp_group = decoder, targets, tp_group
        self.mask = self._share(loss_mask)
        self.loss_sum: Tensor | None = None  # sum over this rank's rows, mean over the pairs

    def __enter__(self):
        self.handles = [
            layer.register_forward_hook(self._hook(self.targets[layer.layer_number]))
            for layer in self.decoder.layers
            if layer.layer_number in self.targets
        ]
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()

    def _hook(self, target: Tensor):
        target = self._share(target)

        def add(module, args, output):
            rows = normalised_distance(output[0], target)
            part = (rows * self.mask).sum() / len(self.targets)
            self.loss_sum = part if self.loss_sum is None else self.loss_sum + part

        return add

    def _share(self, x: Tensor) -> Tensor:
        """`[b, s, ...]` to this rank's `[s/tp, b, ...]`."""
        return split_rows(x.transpose(0, 1), self.tp_group)

    def reported(self) -> Tensor:
        """The sum over all rows of this context-parallel rank."""
        total = self.loss_sum.detach().clone()
        if self.tp_group.size() > 1:
            dist.all_reduce(total, group=self.tp_group)
        return total


def normalised_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """`[...]`: mean squared difference of two `[..., H]` states, each divided by its root mean square."""
    one, other = (
        x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6) for x in (student, teacher)
    )
    return (one - other).pow(2).mean(-1)
