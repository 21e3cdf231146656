"""Runs the teacher on a step's microbatches before the pipeline schedule starts, and adds its targets.

Owns who runs which sequence and the exchange of the targets. The ranks of one model replica (TP x PP x CP)
share out its sequences; all ranks of the world run equally many, because some share the teacher's weights.
"""

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_clsa.data.provider import get_batch
from megatron_clsa.distill.hidden_match import HiddenMatch
from megatron_clsa.distill.logit_kd import TeacherTargets
from megatron_clsa.distill.teacher import Teacher
from megatron_clsa.parallel.context import gather_sequence, local_positions
from megatron_clsa.training.teacher_flags import TeacherSettings

SEQUENCES = ("tokens", "position_ids", "loss_mask")


class TeacherSupply:
    """Stands around Megatron's `train_step`; loads the teacher when it is first asked."""

    def __init__(self, settings: TeacherSettings):
        self.settings = settings
        self.teacher: Teacher | None = None

    def __call__(
        self, train_step, forward_step, data, model, optimizer, scheduler, config, schedule, **named
    ):
        def with_targets(*, data_iterator, model, num_microbatches, **options):
            iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
            stages = [get_attr_wrapped_model(chunk, "vp_stage") for chunk in model]
            batches = [
                [get_batch(iterator, stage) for _ in range(num_microbatches)]
                for iterator, stage in zip(iterators, stages, strict=True)
            ]
            return self.run_schedule(schedule, batches, model, **options)

        return train_step(forward_step, data, model, optimizer, scheduler, config, with_targets, **named)

    def run_schedule(self, schedule, batches: list[list[dict]], model: list, **options) -> list[dict]:
        """A training step's schedule over microbatches of each model chunk; the last stage's figures."""
        batches = self.with_targets(batches, model)
        ready = [iter(part) for part in batches]
        figures = schedule(
            data_iterator=ready if len(ready) > 1 else ready[0],
            model=model,
            num_microbatches=len(batches[0]),
            **options,
        )
        if self.settings.layer_map:
            sums = _distance_sums([[batch.get("hidden") for batch in part] for part in batches])
            for figure, total in zip(figures, sums, strict=False):  # stages before the last have no figures
                mean = total / len(self.settings.layer_map)
                figure["hidden_loss"] = torch.stack([mean, figure["lm loss"][1]])
        return figures

    def with_targets(self, batches: list[list[dict]], matched: list | None = None) -> list[list[dict]]:
        """Microbatches of each model chunk, copied with what the teacher says of them beside them.

        `teacher`: the last stage's `TeacherTargets`; `hidden`: a `HiddenMatch`, where a chunk has matched
        layers. Every rank of the world must call this with as many microbatches.

        Args:
            matched: the model chunks, to have their hidden states matched; None leaves that out.
        """
        self.teacher = self.teacher or Teacher(self.settings.spec, torch.cuda.current_device())
        sequences, count = _whole_sequences(batches[0]), len(batches[0])
        ids, log_probs, states = self._run(sequences[:2])
        made = [list(part) for part in batches]
        if mpu.is_pipeline_last_stage(ignore_virtual=True):
            targets = (
                TeacherTargets(*one, self.settings.spec.temperature) for one in _split(count, ids, log_probs)
            )
            made[-1] = [batch | {"teacher": one} for batch, one in zip(made[-1], targets, strict=True)]
        for number, chunk in enumerate(matched or ()):
            matches = self._matches(chunk, states, sequences[2], count)
            made[number] = [batch | {"hidden": one} for batch, one in zip(made[number], matches, strict=True)]
        return made

    def _run(self, sequences: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of `[2, n, s]` tokens and positions: ids, log probabilities `[n, s, K]`, states `[n, s, L, H]`."""
        number, members, member = sequences.size(1), *_place_in_replica()
        mine = [(member + turn * members) % number for turn in range(math.ceil(number / members))]
        made = [self.teacher.targets(*sequences[:, n]) for n in mine]
        return tuple(_exchange(torch.stack(part))[:number] for part in zip(*made, strict=True))

    def _matches(self, chunk, states: Tensor, mask: Tensor, count: int) -> list[HiddenMatch | None]:
        """One a microbatch, for the matched layers of a model chunk.

        Args:
            states: `[n, s, L, H]`, mask: `[n, s]`, of all sequences.
        """
        decoder, students = get_attr_wrapped_model(chunk, "decoder"), list(self.settings.layer_map)
        here = [layer.layer_number for layer in decoder.layers if layer.layer_number in students]
        if not here:
            return [None] * count
        own = states[:, :, [students.index(number) for number in here]]
        config = get_attr_wrapped_model(chunk, "config")
        return [
            HiddenMatch(
                dict(zip(here, part.unbind(2), strict=True)),
                counted,
                self.settings.hidden_coeff / len(students),
                config,
                decoder.tp_group,
            )
            for part, counted in _split(count, own, mask)
        ]


def _split(count: int, *parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """`[n, s, ...]` tensors to this rank's rows of each of `count` microbatches."""
    cp = mpu.get_context_parallel_group()
    rows = local_positions(parts[0].size(1) // cp.size(), cp, parts[0].device)
    return zip(*(x.index_select(1, rows).chunk(count) for x in parts), strict=True)


def _distance_sums(matches: list[list[HiddenMatch | None]]) -> Tensor:
    """`[microbatches]` fp32: each stage and tensor-parallel rank holds a part. matches: by model chunk."""
    sums = torch.zeros(len(matches[0]), device=torch.cuda.current_device())
    for chunk in matches:
        for number, match in enumerate(chunk):
            sums[number] += match.distance_sum if match is not None else 0.0
    dist.all_reduce(sums, group=mpu.get_model_parallel_group())
    return sums


def _place_in_replica() -> tuple[int, int]:
    """(ranks of this model replica, this rank's number among them)."""
    model, context = mpu.get_model_parallel_group(), mpu.get_context_parallel_group()
    return model.size() * context.size(), model.rank() * context.size() + context.rank()


def _whole_sequences(batches: list[dict]) -> Tensor:
    """`[3, n, s]` int64, `SEQUENCES` of all microbatches on every rank of the replica."""
    pipeline, context = mpu.get_pipeline_model_parallel_group(), mpu.get_context_parallel_group()
    if mpu.is_pipeline_first_stage(ignore_virtual=True):
        shards = torch.stack([torch.cat([batch[key] for batch in batches]).long() for key in SEQUENCES])
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
