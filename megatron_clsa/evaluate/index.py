"""What the index keeps of dense attention, layer by layer, on sampled rows of real text.

Owns the figures of a Hugging Face CLSA model: the training run's own are in distill/probe.py. Axis letters:
b batch, r sampled rows, t memory positions, h query heads, k selected.

The model runs with dense cross-attention, so that each layer's attention is what a dense model would do.
Coverage: the share of a layer's attention (mean over heads) on the selected positions. Oracle: the best
that k positions could hold of that layer. Overlap: the share of those best k that the index selected too.
"""

import torch
from torch import Tensor

from megatron_clsa.evaluate.load import Subject
from megatron_clsa.hf.layers_clsa import to_heads
from megatron_clsa.kernels.dispatch import topk_index
from megatron_clsa.kernels.rows import causal_rows

FIGURES = ("coverage", "oracle_coverage", "recent_coverage", "random_coverage", "overlap")


class _Capture:
    """Records the inputs of the cross-attentions and the memory during one forward pass."""

    def __init__(self, model):
        self.inputs: dict[int, Tensor] = {}
        self.handles = [model.memory.norm.register_forward_hook(self._source)]
        self.handles.append(model.memory.register_forward_hook(self._memory))
        for layer in model.layers[model.config.num_self_decoder_layers :]:
            self.handles.append(layer.cross_attn.register_forward_pre_hook(self._query))

    def _source(self, module, args, out):
        self.source = out

    def _memory(self, module, args, out):
        self.key, _, self.index_key = out

    def _query(self, module, args):
        self.inputs[module.layer_idx] = args[0]

    def close(self):
        for handle in self.handles:
            handle.remove()


def sampled_rows(length: int, topk: int, count: int) -> Tensor:
    """`[r]` positions with more than `topk` visible keys, evenly spread, the last included."""
    return torch.linspace(topk, length - 1, count).round().long().unique()


def attention_of(layer, x: Tensor, key: Tensor, visible: Tensor) -> Tensor:
    """`[r, t]`: a layer's dense attention, mean over heads. x `[r, hidden]` its rows, key `[g, t, d]`."""
    cross = layer.cross_attn
    query = to_heads(cross.q_proj(x)[None], cross.head_dim, cross.q_norm)[0].float()
    key = key.float().repeat_interleave(cross.num_key_value_groups, dim=0)
    score = (query @ key.transpose(1, 2)) * cross.scaling
    return score.masked_fill(~visible, float("-inf")).softmax(-1).mean(0)


def top_mask(score: Tensor, visible: Tensor, k: int) -> Tensor:
    """Mask of the k visible positions of largest score in each row; ties go to the smaller position."""
    order = score.masked_fill(~visible, float("-inf")).sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(visible).scatter_(-1, order[..., :k], True) & visible


@torch.no_grad()
def probe(model, ids: Tensor, count: int) -> tuple[dict[str, Tensor], Tensor]:
    """Figures `[layers, r]` of one sequence `[t]`, and the index's overlap of neighbouring rows `[r]`."""
    config, device = model.config, model.device
    rows = sampled_rows(len(ids), config.index_topk, count).to(device)
    capture, attention = _Capture(model), config.cross_attention
    config.cross_attention = "dense"
    try:
        model(input_ids=ids[None].to(device), use_cache=False)
    finally:
        config.cross_attention = attention
        capture.close()
    position = torch.arange(len(ids), device=device)
    visible = position <= rows[:, None]
    chosen = _index(model, capture, rows, visible)
    before = _index(model, capture, rows - 1, position < rows[:, None])
    shared = (chosen & before).sum(-1) / config.index_topk
    baselines = {
        "recent_coverage": top_mask(position.expand_as(visible).float(), visible, config.index_topk),
        "random_coverage": top_mask(_noise(visible), visible, config.index_topk),
    }
    layers = []
    for i, x in sorted(capture.inputs.items()):
        mass = attention_of(model.layers[i], x[0, rows], capture.key[0], visible)
        best = top_mask(mass, visible, config.index_topk)
        held = {"coverage": chosen, "oracle_coverage": best} | baselines
        figures = {name: (mass * mask).sum(-1) for name, mask in held.items()}
        layers.append(figures | {"overlap": (best & chosen).sum(-1) / config.index_topk})
    return {name: torch.stack([layer[name] for layer in layers]).cpu() for name in FIGURES}, shared.cpu()


@torch.no_grad()
def whole_index(model, ids: Tensor) -> Tensor:
    """`[t, k]` int32: what every row of one sequence `[t]` selects, ascending, -1 after the last."""
    capture = _Capture(model)
    try:
        model(input_ids=ids[None].to(model.device), use_cache=False)
    finally:
        capture.close()
    query = model.memory.indexer.query(capture.source)
    rows = causal_rows(1, len(ids), query.device)
    return topk_index(query, capture.index_key, rows, model.config.index_topk)[0].cpu()


def _index(model, capture: _Capture, rows: Tensor, visible: Tensor) -> Tensor:
    """`[r, t]` bool: what the index selects at `rows`."""
    query = model.memory.indexer.query(capture.source[:, rows])[0].float()
    return top_mask(query @ capture.index_key[0].float().T, visible, model.config.index_topk)


def _noise(visible: Tensor) -> Tensor:
    noise = torch.rand(visible.shape, generator=torch.Generator().manual_seed(0))
    return noise.to(visible.device)


def measure(subject: Subject, ids: Tensor, count: int) -> dict:
    """The index section of the report. ids `[n, length]`, longer than k."""
    probes = [probe(subject.model.model, row, count) for row in ids]
    figures = {name: torch.stack([part[name] for part, _ in probes]).mean((0, 2)) for name in FIGURES}
    first = subject.model.config.num_self_decoder_layers
    by_layer = [
        {"layer": first + i} | {name: values[i].item() for name, values in figures.items()}
        for i in range(len(figures["coverage"]))
    ]
    return {
        "sequences": len(ids),
        "length": ids.shape[1],
        "index_topk": subject.model.config.index_topk,
        "mean": {name: values.mean().item() for name, values in figures.items()},
        "overlap_with_previous_row": torch.stack([shared for _, shared in probes]).mean().item(),
        "by_layer": by_layer,
    }
