"""Runs the teacher on a step's microbatches before the pipeline schedule starts, and adds its targets.

Owns who runs which sequence and the exchange of the targets. The ranks of one model replica (TP x PP x CP)
share out its sequences; all ranks of the world run equally many, because some share the teacher's weights.
"""

import math

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_clsa.data.provider import get_batch
from megatron_clsa.distill.logit_kd import TeacherTargets
from megatron_clsa.distill.teacher import Teacher
from megatron_clsa.parallel.context import gather_sequence, local_positions
from megatron_clsa.training.teacher_flags import TeacherSettings


class TeacherSupply:
    """Stands around Megatron's `train_step`; loads the teacher when it is first asked."""

    def __init__(self, settings: TeacherSettings):
        self.settings = settings
        self.teacher: Teacher | None = None

    def __call__(
        self, train_step, forward_step, data, model, optimizer, scheduler, config, schedule, **named
    ):
        def with_targets(*, data_iterator, model, num_microbatches, **options):
            batches = self._batches(data_iterator, model, num_microbatches)
            ready = [iter(part) for part in batches]
            return schedule(
                data_iterator=ready if len(ready) > 1 else ready[0],
                model=model,
                num_microbatches=num_microbatches,
                **options,
            )

        return train_step(forward_step, data, model, optimizer, scheduler, config, with_targets, **named)

    def _batches(self, data_iterator, model: list, count: int) -> list[list[dict]]:
        """All microbatches of each model chunk; those of the last stage hold their targets."""
        iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        stages = [get_attr_wrapped_model(chunk, "vp_stage") for chunk in model]
        batches = [
            [get_batch(iterator, stage) for _ in range(count)]
            for iterator, stage in zip(iterators, stages, strict=True)
        ]
        return self.with_targets(batches)

    def with_targets(self, batches: list[list[dict]]) -> list[list[dict]]:
        """Microbatches of each model chunk, those of the last stage copied with their targets beside them.

        Every rank of the world must call this with as many microbatches.
        """
        self.teacher = self.teacher or Teacher(self.settings.spec, torch.cuda.current_device())
        targets = self._targets(_whole_sequences(batches[0]), len(batches[0]))
        if not mpu.is_pipeline_last_stage(ignore_virtual=True):
            return batches
        last = [batch | {"teacher": one} for batch, one in zip(batches[-1], targets, strict=True)]
        return [*batches[:-1], last]

    def _targets(self, sequences: Tensor, count: int) -> list[TeacherTargets]:
        """This rank's rows of `count` microbatches. sequences: `[2, n, s]` tokens, positions."""
        number, members, member = sequences.size(1), *_place_in_replica()
        mine = [(member + turn * members) % number for turn in range(math.ceil(number / members))]
        made = [self.teacher.targets(*sequences[:, n]) for n in mine]
        ids, log_probs, states = (_exchange(torch.stack(part))[:number] for part in zip(*made, strict=True))
        cp = mpu.get_context_parallel_group()
        rows = local_positions(sequences.size(2) // cp.size(), cp, sequences.device)
        parts = [x.index_select(1, rows).chunk(count) for x in (ids, log_probs, states)]
        students = list(self.settings.layer_map)
        return [
            TeacherTargets(
                i, p, self.settings.spec.temperature, dict(zip(students, h.unbind(2), strict=True))
            )
            for i, p, h in zip(*parts, strict=True)
        ]


def _place_in_replica() -> tuple[int, int]:
    """(ranks of this model replica, this rank's number among them)."""
    model, context = mpu.get_model_parallel_group(), mpu.get_context_parallel_group()
    return model.size() * context.size(), model.rank() * context.size() + context.rank()


def _whole_sequences(batches: list[dict]) -> Tensor:
    """`[2, n, s]` int64 tokens and positions of all microbatches, on every rank of the replica."""
    pipeline, context = mpu.get_pipeline_model_parallel_group(), mpu.get_context_parallel_group()
    if mpu.is_pipeline_first_stage(ignore_virtual=True):
        shards = torch.stack(
            [torch.cat([batch[key] for batch in batches]) for key in ("tokens", "position_ids")]
        )
        whole = gather_sequence(shards.permute(2, 0, 1).contiguous(), context).permute(1, 2, 0).contiguous()
        shape = torch.tensor(whole.shape, device=whole.device)
    else:
        shape = torch.empty(3, dtype=torch.int64, device=torch.cuda.current_device())
    if pipeline.size() == 1:
        return whole
    first = mpu.get_pipeline_model_parallel_first_rank()
    dist.broadcast(shape, first, group=pipeline)
    if not mpu.is_pipeline_first_stage(ignore_virtual=True):
        whole = torch.empty(shape.tolist(), dtype=torch.int64, device=shape.device)
    dist.broadcast(whole, first, group=pipeline)
    return whole


def _exchange(x: Tensor) -> Tensor:
    """`[turns, ...]` of each rank of a replica -> `[turns * members, ...]` in the order of the sequences."""
    x = x.contiguous()
    for group in (mpu.get_context_parallel_group(), mpu.get_model_parallel_group()):
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x, group=group)
        x = torch.stack(parts)  # [members so far, ..., turns, ...]
    return x.flatten(0, 1).transpose(0, 1).flatten(0, 1)
