"""CLSA in plain float64 torch, whole sequence, N x N matrices: the independent meaning of the model.

Written from the paper's equations on a dict of weights under their checkpoint names; shares no code with the
model. One sequence at a time.
"""

import math

import torch
from torch import Tensor


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x: Tensor, base: float) -> Tensor:
    """RoPE, half rotation. x `[s, h, d]`."""
    s, _, d = x.shape
    angle = torch.arange(s, dtype=x.dtype)[:, None] / base ** (torch.arange(0, d, 2, dtype=x.dtype) / d)
    cos, sin = (f(torch.cat([angle, angle], -1))[:, None] for f in (torch.cos, torch.sin))
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def softmax_over(scores: Tensor, keep: Tensor) -> Tensor:
    return scores.masked_fill(~keep, -math.inf).softmax(-1)


class PlainCLSA:
    """`config`: a CLSAConfig; `weights`: checkpoint names to float64 tensors."""

    def __init__(self, config, weights: dict[str, Tensor]):
        self.c, self.w = config, weights

    def norm(self, x: Tensor, name: str) -> Tensor:
        return rms(x, self.w[name], self.c.layernorm_epsilon)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """q `[s, h, d]`, k, v `[s, g, d]`, keep `[s, s]` -> out `[s, h * d]`, probabilities `[h, s, s]`."""
        repeat = q.size(1) // k.size(1)
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        p = softmax_over(torch.einsum("shd,thd->hst", q, k) / math.sqrt(q.size(-1)), keep)
        return torch.einsum("hst,thd->shd", p, v).flatten(1), p

    def self_layer(self, x: Tensor, i: int, visible: Tensor) -> Tensor:
        c, name = self.c, f"decoder.layers.{i}.self_attention."
        groups, d = c.num_query_groups, c.kv_channels
        y = self.norm(x, name + "linear_qkv.layer_norm_weight") @ self.w[name + "linear_qkv.weight"].T
        q, k, v = y.view(len(x), groups, -1, d).split([c.num_attention_heads // groups, 1, 1], 2)
        q, k, v = q.flatten(1, 2), k.squeeze(2), v.squeeze(2)
        if c.qk_layernorm:
            q, k = self.norm(q, name + "q_layernorm.weight"), self.norm(k, name + "k_layernorm.weight")
        t = torch.arange(len(x))
        window = t[:, None] - t[None] < c.sliding_window
        out, _ = self.attend(rotate(q, c.rotary_base), rotate(k, c.rotary_base), v, visible & window)
        return self.mlp(x + out @ self.w[name + "linear_proj.weight"].T, i)

    def mlp(self, x: Tensor, i: int) -> Tensor:
        name = f"decoder.layers.{i}.mlp."
        y = self.norm(x, name + "linear_fc1.layer_norm_weight") @ self.w[name + "linear_fc1.weight"].T
        gate, up = y.chunk(2, -1)
        return x + (torch.nn.functional.silu(gate) * up) @ self.w[name + "linear_fc2.weight"].T

    def memory(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """K, V `[s, g, d]` and the index scores `[s, s]`."""
        c, w = self.c, self.w
        x = self.norm(h, "memory.norm.weight")
        k, v = (x @ w["memory.linear_kv.weight"].T).view(len(h), -1, 2, c.kv_channels).unbind(2)
        x_idx = x.detach() if c.indexer_detach_input else x
        q_idx, k_idx = (x_idx @ w[f"memory.indexer.linear_{n}.weight"].T for n in "qk")
        if c.cross_qk_norm:
            k = self.norm(k, "memory.k_layernorm.weight")
        if c.index_qk_norm:
            q_idx, k_idx = (
                self.norm(x, f"memory.indexer.{n}_layernorm.weight") for n, x in (("q", q_idx), ("k", k_idx))
            )
        return k, v, q_idx @ k_idx.T / math.sqrt(c.index_head_dim)

    def cross_layer(self, x: Tensor, i: int, k: Tensor, v: Tensor, keep: Tensor, visible: Tensor):
        name = f"decoder.layers.{i}.cross_attention."
        q = self.norm(x, name + "linear_q.layer_norm_weight") @ self.w[name + "linear_q.weight"].T
        q = q.view(len(x), -1, self.c.kv_channels)
        if self.c.cross_qk_norm:
            q = self.norm(q, name + "q_layernorm.weight")
        out, p = self.attend(q, k, v, keep)
        target = p if self.c.kd_loss == "selected" else self.attend(q, k, v, visible)[1]
        return self.mlp(x + out @ self.w[name + "linear_proj.weight"].T, i), target.mean(0).detach()

    def losses(self, tokens: Tensor, labels: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Per-token LM loss and distillation cross-entropy `[s]`. start `[s]`: each row's document start."""
        c, half = self.c, self.c.num_self_decoder_layers
        t = torch.arange(len(tokens))
        visible = (t[None] <= t[:, None]) & (t[None] >= start[:, None])
        h = self.w["embedding.word_embeddings.weight"][tokens]
        for i in range(half):
            h = self.self_layer(h, i, visible)
        k, v, scores = self.memory(h)
        keep = visible
        if c.cross_attention == "sparse":
            order = scores.masked_fill(~visible, -math.inf).sort(dim=-1, descending=True, stable=True).indices
            keep = torch.zeros_like(visible).scatter(1, order[:, : c.index_topk], True) & visible
        targets = []
        for i in range(half, c.num_layers):
            h, target = self.cross_layer(h, i, k, v, keep, visible)
            targets.append(target)
        support = keep if c.kd_loss == "selected" else visible
        log_index = scores.masked_fill(~support, -math.inf).log_softmax(-1).masked_fill(~support, 0.0)
        ce = -(torch.stack(targets).mean(0) * log_index).sum(-1)
        logits = self.norm(h, "decoder.final_layernorm.weight") @ self.w["output_layer.weight"].T
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none"), ce
