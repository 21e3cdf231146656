"""Cross-decoder attention: a query and an output projection around one reading of the shared memory.

`O_t = Attn(Q_t, K[S_t], V[S_t])`. Owns no K or V projection and no index: both come in `CrossContext`,
through the `context` argument that megatron-core's TransformerLayer hands to its cross-attention slot.
"""

from dataclasses import dataclass

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor

from megatron_clsa.kernels import dispatch
from megatron_clsa.model.forward_mode import ForwardMode
from megatron_clsa.model.shared_memory import SharedMemory


@dataclass
class CrossContext:
    """What one layer reads, and the one value it returns beside its output.

    Attributes:
        memory: shared by all layers.
        mode: dense or sparse, with or without distillation.
        kd_sum: scalar fp32, written by the layer: its part of the distillation cross-entropy, summed
            over the counted rows and this rank's heads.
    """

    memory: SharedMemory
    mode: ForwardMode
    kd_sum: Tensor | None = None


@dataclass
class CrossAttentionSubmodules:
    """Specs of the parts; with Transformer Engine `linear_q` holds the layer's input norm as well."""

    linear_q: ModuleSpec | type
    q_layernorm: ModuleSpec | type
    linear_proj: ModuleSpec | type


class CLSACrossAttention(MegatronModule):
    """One cross-decoder layer's attention, heads split over tensor-parallel ranks."""

    def __init__(self, config, submodules, layer_number, pg_collection=None, cp_comm_type=None, name=None):
        super().__init__(config)
        self.layer_number = layer_number
        self.head_dim = config.kv_channels
        width = config.num_attention_heads * self.head_dim
        shared = dict(config=config, is_expert=False, tp_group=pg_collection.tp)
        self.linear_q = build_module(
            submodules.linear_q,
            config.hidden_size,
            width,
            bias=config.add_qkv_bias,
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="q",
            **shared,
        )
        if config.cross_qk_norm:
            self.q_layernorm = build_module(
                submodules.q_layernorm,
                config=config,
                hidden_size=self.head_dim,
                eps=config.layernorm_epsilon,
            )
        self.linear_proj = build_module(
            submodules.linear_proj,
            width,
            config.hidden_size,
            bias=False,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="proj",
            **shared,
        )

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        key_value_states: CrossContext = None,
        inference_context=None,
    ):
        """`[s/cp/tp, b, H] -> ([s/cp/tp, b, H], None)`; fills `kd_sum` of the context if asked."""
        query, _ = self.linear_q(hidden_states)
        query = query.unflatten(-1, (-1, self.head_dim))
        if self.config.cross_qk_norm:
            query = self.q_layernorm(query)
        output = self._attend(query.transpose(0, 1), key_value_states)
        return self.linear_proj(output.transpose(0, 1).flatten(2))

    def _attend(self, query: Tensor, context: CrossContext) -> Tensor:
        """`[b, s/cp, h/tp, d] -> [b, s/cp, h/tp, d]`."""
        memory, mode = context.memory, context.mode
        scale = self.head_dim**-0.5
        if mode.cross_attention == "sparse":
            output, lse = dispatch.sparse_attention(
                query, memory.key, memory.value, memory.index, memory.rows, scale, plan=memory.plan
            )
        else:
            output, lse = dispatch.dense_attention(query, memory.key, memory.value, memory.rows, scale)
        if mode.probe is not None:
            mode.probe.observe(query, memory, scale)
        if mode.kd_loss != "off":
            context.kd_sum = self._kd_sum(query, lse, context, scale)
        return output

    def _kd_sum(self, query: Tensor, lse: Tensor, context: CrossContext, scale: float) -> Tensor:
        """Cross-entropy of the index against this layer's attention; gradient to Q_idx and K_idx only.

        Args:
            query: `[b, s/cp, h/tp, d]`.
            lse: `[b, h/tp, s/cp]` fp32, log of the attention's denominator on the keys that it read.
        Returns:
            Scalar fp32, summed over the counted rows and this rank's heads.
        """
        memory, mode = context.memory, context.mode
        query, key = query.detach(), memory.key.detach()
        selected = mode.kd_loss == "selected"
        if not selected and mode.cross_attention == "sparse":
            with torch.no_grad():  # the full target is dense attention, which a sparse pass has not computed
                _, lse = dispatch.dense_attention(query, key, memory.value, memory.rows, scale)
        return dispatch.attention_kd_sum(
            query,
            key,
            lse.detach(),
            memory.q_idx,
            memory.k_idx,
            memory.rows,
            memory.index if selected else None,
            memory.loss_rows,
            scale,
            self.config.index_head_dim**-0.5,
            plan=memory.plan if selected else None,
        )
