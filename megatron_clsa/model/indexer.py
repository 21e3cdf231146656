"""The indexer: one head that scores every position of the memory for every token.

Owns the projections only. Top-k selection is `shared_memory.py`'s (once a microbatch), scores are the
kernels': `I = Q_idx K_idx^T / sqrt(d_idx)`, causal.
"""

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor


class Indexer(MegatronModule):
    """`Q_idx = H Wq`, `K_idx = H Wk`, replicated over tensor-parallel ranks, each on its own rows."""

    def __init__(self, config, norm_spec):
        super().__init__(config)
        self.linear_q = self._projection()
        self.linear_k = self._projection()
        if config.index_qk_norm:
            size, eps = config.index_head_dim, config.layernorm_epsilon
            self.q_layernorm = build_module(norm_spec, config=config, hidden_size=size, eps=eps)
            self.k_layernorm = build_module(norm_spec, config=config, hidden_size=size, eps=eps)

    def _projection(self) -> torch.nn.Linear:
        config = self.config
        linear = torch.nn.Linear(
            config.hidden_size,
            config.index_head_dim,
            bias=False,
            dtype=config.params_dtype,
            device="cpu" if config.use_cpu_initialization else torch.cuda.current_device(),
        )
        config.init_method(linear.weight.data)
        # Rows are split over TP ranks, the weight is not: gradients are summed over TP.
        linear.weight.sequence_parallel = config.sequence_parallel
        return linear

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[s/cp/tp, b, H] -> [s/cp/tp, b, 2 d_idx]`: Q_idx and K_idx side by side: one gather moves both."""
        if self.config.indexer_detach_input:
            hidden_states = hidden_states.detach()
        query, key = self.linear_q(hidden_states), self.linear_k(hidden_states)
        if self.config.index_qk_norm:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        return torch.cat([query, key], dim=-1)
