"""The sizes that a cost depends on: an architecture, a batch and a parallel layout.

Owns how layers, microbatches and rows fall on ranks, with megatron-core's own arithmetic. No cost is here.
"""

from dataclasses import dataclass
from typing import Literal

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_clsa.config import CLSAConfig


@dataclass(frozen=True)
class Stage:
    """The layers of one pipeline rank, all its model chunks together."""

    rank: int
    self_layers: int
    cross_layers: int
    holds_memory: bool
    first: bool
    last: bool


def chunk_layers(config: CLSAConfig, rank: int) -> list[tuple[int, int]]:
    """(first layer, number of layers) of each model chunk of pipeline rank `rank`.

    Raises:
        AssertionError, ValueError: megatron-core's, if the layers do not fall evenly on chunks.
    """
    if config.pipeline_model_parallel_layout is not None:
        return _chunk_layers_of_layout(config.pipeline_model_parallel_layout.layout, rank)
    chunks = config.virtual_pipeline_model_parallel_size
    return [
        (get_transformer_layer_offset(config, chunk, rank), get_num_layers_to_build(config, chunk, rank))
        for chunk in ([None] if chunks is None else range(chunks))
    ]


def _chunk_layers_of_layout(layout: list[list[list[LayerType]]], rank: int) -> list[tuple[int, int]]:
    """megatron-core counts these with the running process's own rank only. layout: by rank, then chunk."""
    first, found = 0, []
    for chunk in range(len(layout[0])):
        for number, stage in enumerate(layout):
            count = stage[chunk].count(LayerType.decoder)
            if number == rank:
                found.append((first, count))
            first += count
    return found


@dataclass(frozen=True)
class RunShape:
    """One training step.

    Attributes:
        config: the architecture and TP, PP, CP sizes.
        vocab_size: V, padded.
        seq_length: N; micro_batch: b sequences; global_batch: sequences a step.
        ranks: of the whole run.
        tied: embedding and output layer are one matrix.
        dtype_bytes: e, of weights and activations.
        gradient_bytes: of one element of the gradient buffer.
        backend: which modules the layers are made of.
    """

    config: CLSAConfig
    vocab_size: int
    seq_length: int
    micro_batch: int
    global_batch: int
    ranks: int
    tied: bool = False
    dtype_bytes: int = 2
    gradient_bytes: int = 4
    backend: Literal["local", "transformer_engine"] = "transformer_engine"

    @property
    def tp(self) -> int:
        return self.config.tensor_model_parallel_size

    @property
    def pp(self) -> int:
        return self.config.pipeline_model_parallel_size

    @property
    def cp(self) -> int:
        return self.config.context_parallel_size

    @property
    def dp(self) -> int:
        """Replicas of the model; the distributed optimizer shards over dp x cp."""
        return self.ranks // (self.tp * self.pp * self.cp)

    @property
    def chunks(self) -> int:
        """Model chunks a rank (interleaved pipelining)."""
        return self.config.virtual_pipeline_model_parallel_size or 1

    @property
    def microbatches(self) -> int:
        """Of one rank in one step."""
        return self.global_batch // (self.micro_batch * self.dp)

    @property
    def rows(self) -> int:
        """Tokens of a microbatch on one context-parallel rank."""
        return self.micro_batch * self.seq_length // self.cp

    @property
    def tokens(self) -> int:
        """Of one step of the whole run."""
        return self.global_batch * self.seq_length

    def chunk_layers(self, rank: int) -> list[tuple[int, int]]:
        """(first layer, number of layers) of each model chunk of pipeline rank `rank`."""
        return chunk_layers(self.config, rank)

    def stage(self, rank: int) -> Stage:
        """The layers of pipeline rank `rank`."""
        half = self.config.num_self_decoder_layers
        layers = [layer for first, count in self.chunk_layers(rank) for layer in range(first, first + count)]
        windowed = sum(layer < half for layer in layers)
        ends = rank == 0, rank == self.pp - 1
        return Stage(rank, windowed, len(layers) - windowed, half in layers, *ends)

    def in_flight(self, rank: int) -> float:
        """Microbatches whose activations pipeline rank `rank` holds at its peak."""
        if self.chunks == 1:
            return min(self.pp - rank, self.microbatches)
        warm_up = 2 * (self.pp - rank - 1) + (self.chunks - 1) * self.pp + 1
        return min(warm_up / self.chunks, self.microbatches)
