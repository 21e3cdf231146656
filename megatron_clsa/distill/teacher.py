"""A frozen dense teacher: any causal LM folder that transformers loads, with weights spread over ranks.

Owns loading, sharding and one sequence's targets. Who runs which sequence is training/teacher_supply.py's.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

ROWS_AT_ONCE = 1024  # rows whose logits over the whole vocabulary exist at a time
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TeacherSpec:
    """Which teacher and what of it is kept.

    Attributes:
        folder: Hugging Face folder.
        dtype: a key of `DTYPES`.
        shards: ranks that share one copy of the layers' weights.
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


class Teacher:
    """Loads on construction; every rank of the world must construct it together."""

    def __init__(self, spec: TeacherSpec, device):
        from transformers import AutoModelForCausalLM

        self.spec, self.device = spec, device
        model = AutoModelForCausalLM.from_pretrained(spec.folder, dtype=DTYPES[spec.dtype])
        self.model = model.eval().requires_grad_(False)
        group = _shard_group(spec.shards)
        if group is not None:
            _shard(self.model.base_model.layers, group, torch.device(device).type)
        self.model.to(device)

    @torch.no_grad()
    def targets(self, tokens: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of one sequence `[s]`, with positions that restart at each document.

        The ranks that share the weights must call this together.

        Returns:
            ids `[s, K]` int32, log probabilities `[s, K]` fp32, states `[s, layers, H]` (no layers: empty).
        """
        kept: dict[int, Tensor] = {}
        layers = self.model.base_model.layers
        handles = [
            layers[number - 1].register_forward_hook(_keep(kept, number)) for number in self.spec.layers
        ]
        try:
            # Without a mask or a cache, transformers keeps documents apart where position ids restart.
            out = self.model.base_model(
                input_ids=tokens[None], position_ids=position_ids[None], use_cache=False
            )
        finally:
            for handle in handles:
                handle.remove()
        ids, log_probs = self._likeliest(out.last_hidden_state[0])
        states = [kept[number][0] for number in self.spec.layers]
        empty = out.last_hidden_state.new_empty(len(tokens), 0, 0)
        return ids, log_probs, torch.stack(states, dim=1) if states else empty

    def _likeliest(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        head, parts = self.model.get_output_embeddings(), []
        for rows in hidden.split(ROWS_AT_ONCE):
            logits = head(rows)[:, : self.spec.vocabulary].float() / self.spec.temperature
            parts.append(logits.log_softmax(-1).topk(min(self.spec.top_k, self.spec.vocabulary), dim=-1))
        ids, values = torch.cat([p.indices for p in parts]), torch.cat([p.values for p in parts])
        return ids.to(torch.int32), values


def _keep(kept: dict[int, Tensor], number: int):
    def hook(module, args, output):
        kept[number] = output[0] if isinstance(output, tuple) else output

    return hook


def _shard_group(size: int):
    """The group of `size` neighbouring ranks that this rank belongs to; None for a group of one."""
    if size == 1:
        return None
    mine = None
    for first in range(0, dist.get_world_size(), size):
        ranks = list(range(first, first + size))
        group = dist.new_group(ranks)  # every rank takes part in making every group
        mine = group if dist.get_rank() in ranks else mine
    return mine


def _shard(layers, group, device_type: str) -> None:
    """Each rank keeps its part of a layer's weights and gathers the layer when it runs."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    mesh = DeviceMesh.from_group(group, device_type)
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
