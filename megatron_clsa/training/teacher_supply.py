"""Runs the teacher on a step's microbatches before the pipeline schedule starts, and adds its targets.

Owns who runs which sequence and the exchange of the targets. The ranks of one model replica (TP x PP x CP)
share out its sequences; all ranks of the world run equally many, because some share the teacher's weights.
"""

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_clsa.data.provider import get_batch
from megatron_clsa.distill.hidden_match import HiddenMatch
from megatron_clsa.distill.logit_kd import TeacherTargets
from megatron_clsa.distill.teacher import Teacher, gather_ranks
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
        layers = [self._matched_layers(chunk) for chunk in matched or ()]
        ids, log_probs, states = self._run(sequences[:2], [layer for chunk in layers for layer in chunk])
        made = [list(part) for part in batches]
        if mpu.is_pipeline_last_stage(ignore_virtual=True):
            parts = zip(ids.chunk(count), log_probs.chunk(count), strict=True)
            targets = (TeacherTargets(*part, self.settings.spec.temperature) for part in parts)
            made[-1] = [batch | {"teacher": one} for batch, one in zip(made[-1], targets, strict=True)]
        masks = sequences[2][:, _own_rows(sequences)].chunk(count)
        for number, chunk in enumerate(matched or ()):
            own, states = states.split([len(layers[number]), states.size(2) - len(layers[number])], dim=2)
            matches = self._matches(chunk, layers[number], own.chunk(count), masks)
            made[number] = [batch | {"hidden": one} for batch, one in zip(made[number], matches, strict=True)]
        return made

    def _matched_layers(self, chunk) -> list[int]:
        """Numbers (from 1) of a model chunk's layers that are in the layer map."""
        layers = get_attr_wrapped_model(chunk, "decoder").layers
        return [layer.layer_number for layer in layers if layer.layer_number in self.settings.layer_map]

    def _run(self, sequences: Tensor, layers: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Of `[2, n, s]` tokens and positions this rank's rows, one sequence a rank of the replica at a time.

        Args:
            layers: the student's, whose states to match are kept.
        Returns:
            ids, log probabilities `[n, s/cp, K]`, states `[n, s/cp, len(layers), H]`.
        """
        number, members, member = sequences.size(1), *_place_in_replica()
        students = list(self.settings.layer_map)
        rows, places = _own_rows(sequences), [students.index(layer) for layer in layers]
        turns = []
        for first in range(0, number, members):
            made = self.teacher.targets(*sequences[:, (first + member) % number])
            ids, log_probs, states = (_exchange(part)[:, rows] for part in made)
            turns.append((ids, log_probs, states[:, :, places]))
        return tuple(torch.cat(part)[:number] for part in zip(*turns, strict=True))

    def _matches(self, chunk, layers: list[int], states, masks) -> list[HiddenMatch | None]:
        """One a microbatch of a model chunk. states: `[b, s/cp, len(layers), H]` each, masks: `[b, s/cp]`."""
        if not layers:
            return [None] * len(masks)
        coefficient = self.settings.hidden_coeff / len(self.settings.layer_map)
        config, decoder = (get_attr_wrapped_model(chunk, name) for name in ("config", "decoder"))
        return [
            HiddenMatch(
                dict(zip(layers, part.unbind(2), strict=True)), mask, coefficient, config, decoder.tp_group
            )
            for part, mask in zip(states, masks, strict=True)
        ]


def _own_rows(sequences: Tensor) -> Tensor:
    """`[s/cp]` positions of this context-parallel rank's rows. sequences: `[..., s]`."""
    cp = mpu.get_context_parallel_group()
    return local_positions(sequences.size(-1) // cp.size(), cp, sequences.device)


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
    """`[...]` of each rank of a replica -> `[members, ...]` in the order of `_place_in_replica`."""
    for group in (mpu.get_context_parallel_group(), mpu.get_model_parallel_group()):
        x = gather_ranks(x, group)
    return x.flatten(0, 1)
