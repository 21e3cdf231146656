"""What a student learns from a dense teacher's logits: the KL of its top K tokens and the rest.

Owns the loss of one microbatch; where the targets come from is teacher.py's. Axis letters: s rows, b batch,
V vocabulary, K the teacher's kept tokens.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ROWS_AT_ONCE = 1024  # fp32 copies of the logits live for a block of rows only, forward and backward
SMALLEST = 1e-10  # probability of the student's rest, which fp32 differences can round to nothing


@dataclass(frozen=True)
class TeacherTargets:
    """A teacher's view of one microbatch.

    Attributes:
        ids: `[b, s/cp, K]` int32, its likeliest tokens.
        log_probs: `[b, s/cp, K]` fp32 at `temperature`, over its whole vocabulary.
        temperature: of both distributions.
    """

    ids: Tensor
    log_probs: Tensor
    temperature: float = 1.0


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
