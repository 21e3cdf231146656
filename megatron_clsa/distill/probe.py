"""What the index is worth: attention mass on sampled rows, summed over every layer and head.

Owns sampling, collection during a forward pass and the figures made of it. A probe lives for one
microbatch; collecting is linear, so parts from layers, head shards and pipeline stages add up.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_clsa.kernels.rows import RowRange
from megatron_clsa.parallel.context import local_positions

FIGURES = ("attention_coverage", "oracle_coverage", "random_coverage", "recent_coverage", "exact_kl")


def sample_positions(seq: int, count: int) -> Tensor:
    """`[count]` int64 positions, evenly spread over `0..seq-1`, the last included."""
    return torch.linspace(0, seq - 1, min(count, seq)).round().long().unique()


class AttentionProbe:
    """Collects, for sampled rows, the dense attention of this rank's layers and heads, and the index.

    Args:
        config: the model's CLSAConfig.
        batch, seq: of the whole microbatch (all context-parallel ranks).
        num_rows: sampled positions a sequence.
        device: where the sums live.
        pg_collection: process groups of the model.
    """

    def __init__(self, config, batch: int, seq: int, num_rows: int, device, pg_collection):
        self.config, self.groups = config, pg_collection
        cp = pg_collection.cp
        positions = sample_positions(seq, num_rows).to(device)
        mine = local_positions(seq // cp.size(), cp, device)
        hit = mine[None] == positions[:, None]  # [r, s/cp]
        self.owned, self.local_rows = hit.any(1), hit.int().argmax(1)
        shape = (batch, len(positions), seq)
        self.mass = torch.zeros(shape, device=device)
        self.logits = torch.zeros(shape, device=device)
        self.selected = torch.zeros(shape, device=device)
        self.visible = torch.zeros(shape, device=device)
        self.counted = torch.zeros(shape[:2], device=device)

    @torch.no_grad()
    def observe(self, query: Tensor, memory, scale: float) -> None:
        """Add one layer's attention mass. query `[b, s/cp, h/tp, d]`; `memory`: the stage's SharedMemory."""
        take = self.local_rows
        query = query[:, take].float().unflatten(2, (memory.key.size(2), -1))
        scores = torch.einsum("brgqd,bsgd->bgqrs", query, memory.key.float()) * scale
        rows = RowRange(memory.rows.start[:, take], memory.rows.end[:, take])
        visible = rows.mask(memory.key.size(1))
        owned = self.owned[:, None]
        probability = scores.masked_fill(~visible[:, None, None], float("-inf")).softmax(-1).sum((1, 2))
        self.mass += probability * owned
        self._observe_index(memory, visible, owned)

    def _observe_index(self, memory, visible: Tensor, owned: Tensor) -> None:
        """The index is the same for all layers: written again by each, never added."""
        take = self.local_rows
        index = memory.index[:, take].long()
        num_keys = visible.size(-1)
        chosen = visible.new_zeros(*index.shape[:2], num_keys + 1)
        chosen.scatter_(2, index.masked_fill(index < 0, num_keys), True)
        logits = torch.einsum("brd,bsd->brs", memory.q_idx[:, take].float(), memory.k_idx.float())
        self.logits = logits * self.config.index_head_dim**-0.5 * owned
        self.selected, self.visible = (chosen[..., :-1] & owned).float(), (visible & owned).float()
        self.counted = (memory.loss_rows[:, take] & self.owned).float()

    def finish(self) -> dict[str, float]:
        """Mean figures over all sampled rows of all ranks. Every rank of the model must call it."""
        tp, pp = self.groups.tp, self.groups.pp
        for group in (tp, pp):
            if group.size() > 1:
                dist.all_reduce(self.mass, group=group)
        if pp.size() > 1:  # stages without cross-decoder layers hold zeros, the others hold the same values
            for name in ("logits", "selected", "visible", "counted"):
                dist.all_reduce(getattr(self, name), op=dist.ReduceOp.SUM, group=pp)
            holders = self.visible.amax().clamp(min=1)
            self.logits, self.selected, self.visible, self.counted = (
                x / holders for x in (self.logits, self.selected, self.visible, self.counted)
            )
        heads = self.config.num_cross_decoder_layers * self.config.num_attention_heads
        sums = row_figures(
            RowSample(self.mass / heads, self.logits, self.selected > 0.5, self.visible > 0.5),
            self.config.index_topk,
        )
        totals = torch.stack([*((value * self.counted).sum() for value in sums), self.counted.sum()])
        dist.all_reduce(totals, group=self.groups.dp_cp)
        return dict(zip(FIGURES, (totals[:-1] / totals[-1].clamp(min=1)).tolist(), strict=True))


@dataclass(frozen=True)
class RowSample:
    """Sampled rows: consensus attention, index logits, selection and visibility, each `[b, r, s]`."""

    attention: Tensor
    logits: Tensor
    selected: Tensor
    visible: Tensor


def row_figures(sample: RowSample, topk: int) -> tuple[Tensor, ...]:
    """Figures of each row, `[b, r]` each, in the order of `FIGURES`.

    Coverage is the share of the consensus attention on the selected positions; the oracle selects the best
    `topk` by that very mass, the others a random or the most recent `topk`. KL: over all visible positions.
    """
    attention, visible = sample.attention, sample.visible
    k = min(topk, attention.size(-1))
    oracle = attention.topk(k, dim=-1).values.sum(-1)
    position = torch.arange(attention.size(-1), device=attention.device).expand_as(attention)
    recent = _coverage_by(position.float(), sample, k)
    generator = torch.Generator(device=attention.device).manual_seed(0)
    noise = torch.rand(attention.shape, device=attention.device, generator=generator)
    log_q = sample.logits.masked_fill(~visible, float("-inf")).log_softmax(-1).masked_fill(~visible, 0.0)
    kl = (torch.xlogy(attention, attention) - attention * log_q).sum(-1)
    return (attention * sample.selected).sum(-1), oracle, _coverage_by(noise, sample, k), recent, kl


def _coverage_by(score: Tensor, sample: RowSample, k: int) -> Tensor:
    """`[b, r]`: mass on the `k` visible positions of largest `score`."""
    chosen = score.masked_fill(~sample.visible, -1.0).topk(k, dim=-1).indices
    return sample.attention.gather(-1, chosen).sum(-1)
