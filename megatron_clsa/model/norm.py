"""RMSNorm of the local (no Transformer Engine) spec, legal under sequence parallelism.

Owns no choice of where norms stand: `layer_specs.py` does. megatron-core's WrappedTorchNorm refuses sequence
parallelism only because torch's norms lack the attribute by which gradients are summed over TP ranks.
"""

import torch
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """`x * rsqrt(mean(x^2) + eps) * weight` over the last axis, in fp32, returned in `x`'s dtype."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **unused):
        super().__init__()
        self.eps, self.shape = eps, (hidden_size,)
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """`[..., hidden_size] -> [..., hidden_size]`."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return torch.nn.functional.rms_norm(x.to(wide), self.shape, self.weight.to(wide), self.eps).to(
            x.dtype
        )
