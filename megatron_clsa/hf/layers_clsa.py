"""CLSA's modules: norm, MLP, RoPE, window attention, cross-attention, indexer, memory, decoder layers.

Owns no model and no cache handling (modeling_clsa.py), no masks and no attention calls (attention_clsa.py).
Axis letters: b batch, s rows, t memory positions, h query heads, g key/value heads, d head dim.
"""

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_clsa import Visible, attend, attend_window, index_cross_entropy
from .configuration_clsa import CLSAConfig
from .kernels_clsa import Selected, index_loss


class CLSARMSNorm(nn.Module):
    """x * rsqrt(mean x^2 + eps) * weight, in fp32, over the last axis."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class CLSAMLP(nn.Module):
    """SwiGLU: down(act(gate x) * up x)."""

    def __init__(self, config: CLSAConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def rotary_tables(config: CLSAConfig, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin `[b, 1, s, d]` of the half-rotation (Llama) order, computed in fp32."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=position_ids.device)
    # as training rounds it: at position 3000 another order of these operations moves a logit by 1e-4
    frequency = 1.0 / config.rope_parameters["rope_theta"] ** (exponent / config.head_dim)
    angle = position_ids[:, None, :, None].float() * frequency
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class _Heads(nn.Module):
    """What both attentions share: the projection to heads and its optional norm."""

    def __init__(self, config: CLSAConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim, self.scaling = config.head_dim, config.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads

    def _linear(self, heads: int) -> nn.Linear:
        return nn.Linear(self.config.hidden_size, heads * self.head_dim, bias=self.config.attention_bias)

    def _output(self) -> nn.Linear:
        width = self.config.num_attention_heads * self.head_dim
        return nn.Linear(width, self.config.hidden_size, bias=False)

    def _norm(self, used: bool) -> CLSARMSNorm | None:
        return CLSARMSNorm(self.head_dim, self.config.rms_norm_eps) if used else None


def to_heads(x: Tensor, head_dim: int, norm: CLSARMSNorm | None) -> Tensor:
    """`[b, s, heads * d]` -> `[b, heads, s, d]`, each head normalised when there is a norm."""
    x = x.unflatten(-1, (-1, head_dim))
    return (x if norm is None else norm(x)).transpose(1, 2)


class CLSASelfAttention(_Heads):
    """Sliding-window attention with RoPE, for the self-decoder."""

    def __init__(self, config: CLSAConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.sliding_window = config.sliding_window
        self.q_proj = self._linear(config.num_attention_heads)
        self.k_proj = self._linear(config.num_key_value_heads)
        self.v_proj = self._linear(config.num_key_value_heads)
        self.o_proj = self._output()
        self.q_norm = self._norm(config.use_qk_norm)
        self.k_norm = self._norm(config.use_qk_norm)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, seen: Visible, cache: Cache | None, **kwargs):
        query = rotate(to_heads(self.q_proj(x), self.head_dim, self.q_norm), cos, sin)
        key = rotate(to_heads(self.k_proj(x), self.head_dim, self.k_norm), cos, sin)
        value = to_heads(self.v_proj(x), self.head_dim, None)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        out, weights = attend_window(self, query, key, value, seen, **kwargs)
        return self.o_proj(out.flatten(2)), weights


class CLSACrossAttention(_Heads):
    """Attention to the memory at the selected positions; has no key or value projection of its own."""

    def __init__(self, config: CLSAConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.q_proj = self._linear(config.num_attention_heads)
        self.o_proj = self._output()
        self.q_norm = self._norm(config.cross_qk_norm)

    def forward(
        self, x: Tensor, key: Tensor, value: Tensor, index: Tensor | None, mask: Tensor | Selected, **kwargs
    ):
        """`index` is given where its loss is wanted: what `CLSAIndexer.taught` returns for this `mask`."""
        query = to_heads(self.q_proj(x), self.head_dim, self.q_norm)
        out, weights = attend(self, query, key, value, mask, **kwargs)
        loss = None
        if isinstance(mask, Selected):
            lse, weights = weights, None
            loss = None if index is None else index_loss(self, query, key, lse, index, mask)
        elif index is not None:
            loss = index_cross_entropy(query, key, index, mask, self.scaling)
        return self.o_proj(out.flatten(2)), weights, loss


class CLSAIndexer(nn.Module):
    """One head that scores memory positions: `I = q . k / sqrt(d)`, the same for all cross-decoder layers."""

    def __init__(self, config: CLSAConfig):
        super().__init__()
        size = config.index_head_dim
        self.scaling = size**-0.5
        self.q_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.q_norm = CLSARMSNorm(size, config.rms_norm_eps) if config.index_qk_norm else None
        self.k_norm = CLSARMSNorm(size, config.rms_norm_eps) if config.index_qk_norm else None

    def query(self, x: Tensor) -> Tensor:
        return self.q_proj(x) if self.q_norm is None else self.q_norm(self.q_proj(x))

    def key(self, x: Tensor) -> Tensor:
        return self.k_proj(x) if self.k_norm is None else self.k_norm(self.k_proj(x))

    def taught(self, query: Tensor, key: Tensor, mask: Tensor | Selected) -> Tensor:
        """What the index loss is made from, as one tensor that checkpointing can follow.

        With a mask `[b, 1, s, t]` the log softmax of the scores over it, `[b, s, t]`, 0 outside; with a
        `Selected` queries and keys one after the other, `[b, s + t, di]`.
        """
        if isinstance(mask, Selected):
            return torch.cat([query, key], dim=1)
        hidden = ~mask[:, 0]
        score = (query.float() @ key.float().transpose(1, 2)) * self.scaling
        return (
            score.masked_fill(hidden, torch.finfo(torch.float32).min).log_softmax(-1).masked_fill(hidden, 0.0)
        )


class CLSAMemory(nn.Module):
    """Keys and values `[b, g, t, d]` and indexer keys `[b, t, di]` that all cross-decoder layers read."""

    def __init__(self, config: CLSAConfig):
        super().__init__()
        width = config.num_key_value_heads * config.head_dim
        self.head_dim = config.head_dim
        self.norm = CLSARMSNorm(config.hidden_size, config.rms_norm_eps)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_norm = CLSARMSNorm(config.head_dim, config.rms_norm_eps) if config.cross_qk_norm else None
        self.indexer = CLSAIndexer(config)

    def forward(self, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key = to_heads(self.k_proj(source), self.head_dim, self.k_norm)
        return key, to_heads(self.v_proj(source), self.head_dim, None), self.indexer.key(source)


class CLSADecoderLayer(GradientCheckpointingLayer):
    """Pre-norm residual block; the kinds below add the attention, each under its name in the weights."""

    def __init__(self, config: CLSAConfig):
        super().__init__()
        self.input_layernorm = CLSARMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = CLSARMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = CLSAMLP(config)

    def _finish(self, residual: Tensor, attention: Tensor) -> Tensor:
        hidden = residual + attention
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class CLSASelfDecoderLayer(CLSADecoderLayer):
    def __init__(self, config: CLSAConfig, layer_idx: int):
        super().__init__(config)
        self.self_attn = CLSASelfAttention(config, layer_idx)

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, seen: Visible, past_key_values=None, **kwargs
    ):
        out, _ = self.self_attn(self.input_layernorm(hidden), cos, sin, seen, past_key_values, **kwargs)
        return self._finish(hidden, out)


class CLSACrossDecoderLayer(CLSADecoderLayer):
    """Takes whatever needs a gradient by position, so that reentrant checkpointing sees it."""

    def __init__(self, config: CLSAConfig, layer_idx: int):
        super().__init__(config)
        self.cross_attn = CLSACrossAttention(config, layer_idx)

    def forward(
        self,
        hidden: Tensor,
        key: Tensor,
        value: Tensor,
        index: Tensor | None,
        mask: Tensor | Selected,
        **kwargs,
    ):
        out, _, loss = self.cross_attn(self.input_layernorm(hidden), key, value, index, mask, **kwargs)
        return self._finish(hidden, out), loss
