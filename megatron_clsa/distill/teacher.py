"""A frozen dense teacher: any causal LM folder that transformers loads, spread over ranks or tensor-parallel.

Owns loading and one sequence's targets. How transformers' models are taken apart and spread is
teacher_model.py's, who runs which sequence training/teacher_supply.py's.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_clsa.distill.teacher_model import (
    keeps_documents_apart,
    layers_of,
    shard_layers,
    split_heads,
    take_trunk,
)
from megatron_clsa.errors import UserError

ROWS_AT_ONCE = 1024  # rows whose logits over the whole vocabulary exist at a time
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TeacherSpec:
    """Which teacher and what of it is kept.

    Attributes:
        folder: Hugging Face folder.
        dtype: a key of `DTYPES`.
        shards: ranks that share one copy of the layers' weights and gather a layer when it runs.
        tensor_parallel: ranks that split heads, MLP and vocabulary and run each other's sequences together.
        vocabulary: tokens of the tokenizer; whatever the teacher's padding says is ignored.
        top_k: tokens kept for a row.
        temperature: of its distribution.
        layers: whose outputs are kept (from 1).
    """

    folder: Path
    dtype: str
    shards: int
    vocabulary: int
    top_k: int
    temperature: float
    layers: tuple[int, ...] = ()
    tensor_parallel: int = 1


class Teacher:
    """Loads on construction; every rank of the world must construct it together."""

    def __init__(self, spec: TeacherSpec, device):
        from transformers import AutoModelForCausalLM

        self.spec, self.device = spec, device
        model, report = AutoModelForCausalLM.from_pretrained(
            spec.folder, dtype=DTYPES[spec.dtype], use_safetensors=True, output_loading_info=True
        )
        if report["missing_keys"]:  # transformers would go on with random numbers in their place
            raise UserError(f"--teacher {spec.folder} lacks {min(report['missing_keys'])}: save it again")
        self.model = model.eval().requires_grad_(False)
        kind = torch.device(device).type
        self.tp_group = _group_of_neighbours(spec.tensor_parallel)
        if (group := _group_of_neighbours(spec.shards)) is not None:
            shard_layers(self.model, group, kind)
        if self.tp_group is not None:
            split_heads(self.model, self.tp_group, kind)
        self.model.to(device)
        self.trunk = take_trunk(self.model)
        if not keeps_documents_apart(self.trunk, device):
            raise UserError(
                f"--teacher {spec.folder}: {self.model.config.model_type} lets a document see the one before "
                "it in a sequence; use a model of another family"
            )

    @torch.no_grad()
    def targets(self, tokens: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of one sequence `[s]`, with positions that restart at each document.

        The ranks that share the weights must call this together, with sequences of one length.
        Tensor-parallel ranks run the sequence of each of them in turn, and each returns its own.

        Returns:
            ids `[s, K]` int32, log probabilities `[s, K]` fp32, states `[s, layers, H]` (no layers: empty).
        """
        if self.tp_group is None:
            return self._run(tokens, position_ids)
        everyones = gather_ranks(torch.stack([tokens, position_ids]), self.tp_group)
        return [self._run(*one) for one in everyones][self.tp_group.rank()]

    def _run(self, tokens: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept: dict[int, Tensor] = {}
        handles = [
            layers_of(self.trunk)[number - 1].register_forward_hook(_keep(kept, number))
            for number in self.spec.layers
        ]
        try:
            # Without a mask or a cache, transformers keeps documents apart where position ids restart.
            out = self.trunk(input_ids=tokens[None], position_ids=position_ids[None], use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        ids, log_probs = self._likeliest(out.last_hidden_state[0])
        states = [kept[number][0] for number in self.spec.layers]
        empty = out.last_hidden_state.new_empty(len(tokens), 0, 0)
        return ids, log_probs, torch.stack(states, dim=1) if states else empty

    def _likeliest(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        parts = []
        for rows in hidden.split(ROWS_AT_ONCE):
            logits = self.model(inputs_embeds=rows[None], use_cache=False).logits[0]
            parts.append(likeliest(logits, self.spec, self.tp_group))
        ids, log_probs = (torch.cat(part) for part in zip(*parts, strict=True))
        return ids.to(torch.int32), log_probs


def likeliest(logits: Tensor, spec: TeacherSpec, group=None) -> tuple[Tensor, Tensor]:
    """Exact top k of rows: ids and log probabilities `[rows, K]`, the same on every rank of `group`.

    A token among the k likeliest of all is among the k likeliest of its shard, so shards exchange only those.

    Args:
        logits: `[rows, V/tp]`, this rank's shard of the teacher's own (padded) vocabulary.
    """
    first = group.rank() * logits.size(-1) if group is not None else 0
    scaled = logits[:, : max(spec.vocabulary - first, 0)].float() / spec.temperature
    if group is None:
        best = scaled.log_softmax(-1).topk(min(spec.top_k, spec.vocabulary), dim=-1)
        return best.indices, best.values
    padding = scaled.new_full((len(scaled), logits.size(-1) - scaled.size(-1)), -torch.inf)
    scaled = torch.cat([scaled, padding], dim=-1)
    best = scaled.topk(min(spec.top_k, scaled.size(-1)), dim=-1)
    total = gather_ranks(scaled.logsumexp(-1), group).logsumexp(0)
    ids, values = (
        gather_ranks(x, group).transpose(0, 1).flatten(1) for x in (best.indices + first, best.values)
    )
    best = values.topk(min(spec.top_k, spec.vocabulary), dim=-1)
    return ids.gather(-1, best.indices), best.values - total[:, None]


def gather_ranks(x: Tensor, group) -> Tensor:
    """`[...]` of each rank -> `[ranks, ...]`."""
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.stack(parts)


def _keep(kept: dict[int, Tensor], number: int):
    def hook(module, args, output):
        kept[number] = output[0] if isinstance(output, tuple) else output

    return hook


def _group_of_neighbours(size: int):
    """The group of `size` neighbouring ranks that this rank belongs to; None for a group of one."""
    if size == 1:
        return None
    mine = None
    for first in range(0, dist.get_world_size(), size):
        ranks = list(range(first, first + size))
        group = dist.new_group(ranks)  # every rank takes part in making every group
        mine = group if dist.get_rank() in ranks else mine
    return mine
