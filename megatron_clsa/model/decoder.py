"""The layers of one pipeline stage: its share of self-decoder and cross-decoder.

Owns the walk through the layers and activation recompute; not the embedding or the loss (`clsa_model.py`).
"""

from collections.abc import Callable, Sequence

from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor, nn

from megatron_clsa.distill.kd_loss import kd_share
from megatron_clsa.model.cross_attention import CrossContext
from megatron_clsa.model.forward_mode import ForwardMode
from megatron_clsa.model.layer_specs import CLSASpec
from megatron_clsa.model.shared_memory import SharedMemory


class CLSADecoder(MegatronModule):
    """Layers `first_layer .. first_layer + num_layers - 1` (counted from 0 over the whole model)."""

    def __init__(
        self, config, spec: CLSASpec, first_layer: int, num_layers: int, pg_collection, final_norm: bool
    ):
        super().__init__(config)
        self.first_layer, self.tp_group = first_layer, pg_collection.tp
        half = config.num_self_decoder_layers
        self.layers = nn.ModuleList(
            build_module(
                spec.self_layer if number < half else spec.cross_layer,
                config=config,
                layer_number=number + 1,
                pg_collection=pg_collection,
                add_layer_offset=False,
            )
            for number in range(first_layer, first_layer + num_layers)
        )
        self.num_self_layers = min(max(half - first_layer, 0), num_layers)
        if final_norm:
            self.final_layernorm = build_module(
                spec.final_norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )

    def run_self_layers(
        self, hidden_states: Tensor, rows: Tensor, rotary_pos_emb: Tensor, mode: ForwardMode
    ) -> Tensor:
        """`[s/cp/tp, b, H]` before and after. rows: `[2, b, s/cp]`, first and last visible position."""

        def run(layers: Sequence[nn.Module], hidden_states: Tensor, rows: Tensor) -> Tensor:
            for layer in layers:
                hidden_states, _ = layer(hidden_states, attention_mask=rows, rotary_pos_emb=rotary_pos_emb)
            return hidden_states

        for layers, recompute in self._groups(self.layers[: self.num_self_layers], mode):
            hidden_states = self._call(run, layers, recompute, hidden_states, rows)
            hidden_states = _match(mode, layers, hidden_states)
        return hidden_states

    def run_cross_layers(
        self, hidden_states: Tensor, memory: SharedMemory, mode: ForwardMode, kd_sum: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`[s/cp/tp, b, H]` and the distillation sum so far, both after this stage's cross-decoder layers."""

        # Arguments, not closures: re-entrant recompute returns gradients to its arguments only.
        def run(layers, hidden_states, kd_sum, key, value, q_idx, k_idx):
            local = SharedMemory(
                key, value, q_idx, k_idx, memory.index, memory.rows, memory.loss_rows, memory.plan
            )
            for layer in layers:
                context = CrossContext(local, mode)
                hidden_states, _ = layer(hidden_states, context=context)
                if context.kd_sum is not None:
                    kd_sum = kd_sum + kd_share(context.kd_sum, self.config)
            return hidden_states, kd_sum

        tensors = memory.key, memory.value, memory.q_idx, memory.k_idx
        for layers, recompute in self._groups(self.layers[self.num_self_layers :], mode):
            hidden_states, kd_sum = self._call(run, layers, recompute, hidden_states, kd_sum, *tensors)
            hidden_states = _match(mode, layers, hidden_states)
        return hidden_states, kd_sum

    def _groups(self, layers: Sequence[nn.Module], mode: ForwardMode):
        """Split after each layer with a state to match, and into what full recompute recomputes together."""
        matched = mode.hidden.targets if mode.hidden is not None else ()
        groups, first = [], 0
        for last, layer in enumerate(layers, 1):
            if layer.layer_number in matched or last == len(layers):
                groups += self._recomputed(layers[first:last], first)
                first = last
        return groups

    def _recomputed(self, layers: Sequence[nn.Module], first: int):
        """Groups of layers and whether `--recompute-granularity full` recomputes them.

        Args:
            first: layers of this stage's half before these; the block method counts them.
        """
        config = self.config
        full = config.recompute_granularity == "full" and self.training and config.trainable != "indexer"
        if not full:
            return [(layers, False)]
        size = config.recompute_num_layers or 1
        if config.recompute_method == "block":
            return [([layer], number < size) for number, layer in enumerate(layers, first)]
        return [(layers[i : i + size], True) for i in range(0, len(layers), size)]

    def _call(self, run: Callable, layers, recompute: bool, *tensors):
        if not recompute:
            return run(layers, *tensors)
        distribute = self.config.distribute_saved_activations
        return tensor_parallel.checkpoint(lambda *args: run(layers, *args), distribute, *tensors)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Layers under their global number, so that any pipeline layout reads any checkpoint."""
        state = {}
        for i, layer in enumerate(self.layers):
            local, world = f"{prefix}layers.{i}.", f"{prefix}layers.{self.first_layer + i}."
            entries = layer.sharded_state_dict(local, [], metadata)
            replace_prefix_for_sharding(entries, local, world)
            state.update(entries)
        if hasattr(self, "final_layernorm"):
            state.update(
                sharded_state_dict_default(
                    self.final_layernorm,
                    f"{prefix}final_layernorm.",
                    sharded_offsets,
                    metadata,
                    tp_group=self.tp_group,
                )
            )
        return state


def _match(mode: ForwardMode, layers: Sequence[nn.Module], hidden_states: Tensor) -> Tensor:
    """After a group: outside of recompute, which would add its distance twice."""
    if mode.hidden is None:
        return hidden_states
    return mode.hidden.after_layer(layers[-1].layer_number, hidden_states)
