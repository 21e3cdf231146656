"""Parameters by part of the model, whole and by rank.

Owns the sizes of all matrices and norms; what each means is told in model/. Norms and the indexer are
replicated over tensor-parallel ranks, everything else is split. No part has a bias.
"""

from dataclasses import dataclass

from megatron_clsa.config import CLSAConfig
from megatron_clsa.estimate.shape import RunShape, Stage


@dataclass(frozen=True)
class Part:
    """Parameters of a part: split over tensor-parallel ranks, and replicated."""

    split: int = 0
    replicated: int = 0

    @property
    def total(self) -> int:
        return self.split + self.replicated

    def on_rank(self, tp: int) -> int:
        return self.split // tp + self.replicated

    def __add__(self, other: "Part") -> "Part":
        return Part(self.split + other.split, self.replicated + other.replicated)

    def __mul__(self, count: int) -> "Part":
        return Part(self.split * count, self.replicated * count)


def mlp(c: CLSAConfig) -> Part:
    """fc1 (gate and up), fc2, and the norm before them."""
    return Part((3 if c.gated_linear_unit else 2) * c.hidden_size * c.ffn_hidden_size, c.hidden_size)


def self_layer(c: CLSAConfig) -> Part:
    """`Wq, Wk, Wv, Wo`, the norm before them, the norms of query and key, the MLP."""
    heads, groups = c.num_attention_heads * c.kv_channels, c.num_query_groups * c.kv_channels
    norms = c.hidden_size + (2 * c.kv_channels if c.qk_layernorm else 0)
    return Part(c.hidden_size * (2 * heads + 2 * groups), norms) + mlp(c)


def cross_layer(c: CLSAConfig) -> Part:
    """`Wq, Wo` (no K, no V), the norm before them, the norm of the query, the MLP."""
    heads = c.num_attention_heads * c.kv_channels
    norms = c.hidden_size + (c.kv_channels if c.cross_qk_norm else 0)
    return Part(2 * c.hidden_size * heads, norms) + mlp(c)


def memory(c: CLSAConfig) -> Part:
    """`Wk, Wv` of the one memory and its norms."""
    norms = c.hidden_size + (c.kv_channels if c.cross_qk_norm else 0)
    return Part(2 * c.hidden_size * c.num_query_groups * c.kv_channels, norms)


def indexer(c: CLSAConfig) -> Part:
    """`Wq, Wk` of the one index head."""
    return Part(0, 2 * c.index_head_dim * (c.hidden_size + (1 if c.index_qk_norm else 0)))


def by_part(run: RunShape) -> dict[str, Part]:
    """The whole model."""
    c = run.config
    vocabulary = Part(run.vocab_size * c.hidden_size)
    return {
        "embedding": vocabulary,
        "self-decoder": self_layer(c) * c.num_self_decoder_layers,
        "memory": memory(c),
        "indexer": indexer(c),
        "cross-decoder": cross_layer(c) * c.num_cross_decoder_layers,
        "final norm": Part(0, c.hidden_size),
        "output layer": Part() if run.tied else vocabulary,
    }


def total(run: RunShape) -> int:
    return sum(part.total for part in by_part(run).values())


def of_stage(run: RunShape, stage: Stage) -> tuple[Part, Part]:
    """(backbone, indexer) of one pipeline rank. A tied embedding lies on the last stage too."""
    c = run.config
    vocabulary = Part(run.vocab_size * c.hidden_size)
    backbone = self_layer(c) * stage.self_layers + cross_layer(c) * stage.cross_layers
    if stage.first:
        backbone += vocabulary
    if stage.last:
        backbone += Part(0, c.hidden_size)
        backbone += Part() if run.tied and run.pp == 1 else vocabulary
    if not stage.holds_memory:
        return backbone, Part()
    return backbone + memory(c), indexer(c)


def trainable(run: RunShape, stage: Stage) -> Part:
    """What the phase trains of one pipeline rank."""
    backbone, index = of_stage(run, stage)
    return {"all": backbone + index, "backbone": backbone, "indexer": index}[run.config.trainable]
