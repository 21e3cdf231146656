"""CLSA written out row by row in float64 from a state dict: what the Hugging Face model must equal.

Owns no test. Follows the folder's contract literally: no cache, no blocks, no masks.
"""

import torch
from torch import Tensor


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rope(x: Tensor, theta: float) -> Tensor:
    """x `[s, heads, d]` at positions 0..s-1, half-rotation order."""
    s, _, d = x.shape
    frequency = theta ** (-torch.arange(0, d, 2, dtype=x.dtype) / d)
    angle = torch.arange(s, dtype=x.dtype)[:, None] * frequency
    angle = torch.cat((angle, angle), -1)[:, None]
    return x * angle.cos() + torch.cat((-x[..., d // 2 :], x[..., : d // 2]), -1) * angle.sin()


def attend_row(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """query `[h, d]`, key and value `[n, g, d]` -> output `[h * d]`, weights `[h, n]`."""
    groups = query.shape[0] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    weight = torch.einsum("hd,nhd->hn", query, key).div(query.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("hn,nhd->hd", weight, value).flatten(), weight


class Naive:
    """Logits of one sequence; keeps the index of the last call in `selected`."""

    def __init__(self, config, state: dict[str, Tensor]):
        self.c = config
        self.w = {name: tensor.double() for name, tensor in state.items()}

    def heads(self, x: Tensor, weight: str, norm_weight: str | None) -> Tensor:
        out = (x @ self.w[weight].T).unflatten(-1, (-1, self.c.head_dim))
        return out if norm_weight is None else norm(out, self.w[norm_weight], self.c.rms_norm_eps)

    def window_attention(self, x: Tensor, at: str) -> Tensor:
        qk = self.c.use_qk_norm
        theta = self.c.rope_parameters["rope_theta"]
        query = rope(self.heads(x, f"{at}.q_proj.weight", f"{at}.q_norm.weight" if qk else None), theta)
        key = rope(self.heads(x, f"{at}.k_proj.weight", f"{at}.k_norm.weight" if qk else None), theta)
        value = self.heads(x, f"{at}.v_proj.weight", None)
        rows = []
        for t in range(len(x)):
            near = slice(max(0, t - self.c.sliding_window + 1), t + 1)
            rows.append(attend_row(query[t], key[near], value[near])[0])
        return torch.stack(rows) @ self.w[f"{at}.o_proj.weight"].T

    def index(self, source: Tensor) -> list[Tensor]:
        at, use = "model.memory.indexer", self.c.index_qk_norm
        query, key = (source @ self.w[f"{at}.{n}_proj.weight"].T for n in "qk")
        if use:
            query, key = (
                norm(x, self.w[f"{at}.{n}_norm.weight"], self.c.rms_norm_eps)
                for n, x in (("q", query), ("k", key))
            )
        self.score = query @ key.T / self.c.index_head_dim**0.5
        chosen = []
        for t in range(len(source)):
            order = sorted(range(t + 1), key=lambda j: (-self.score[t, j].item(), j))
            chosen.append(torch.tensor(sorted(order[: self.c.index_topk])))
        return chosen

    def logits(self, tokens: Tensor) -> Tensor:
        """tokens `[s]` -> `[s, vocabulary]`."""
        c, w = self.c, self.w
        x = w["model.embed_tokens.weight"][tokens]
        self.index_loss = 0.0
        for i in range(c.num_hidden_layers):
            at = f"model.layers.{i}"
            if i == c.num_self_decoder_layers:
                source = norm(x, w["model.memory.norm.weight"], c.rms_norm_eps)
                knorm = "model.memory.k_norm.weight" if c.cross_qk_norm else None
                key = self.heads(source, "model.memory.k_proj.weight", knorm)
                value = self.heads(source, "model.memory.v_proj.weight", None)
                self.selected = self.index(source)
                if c.cross_attention == "dense":
                    self.selected = [torch.arange(t + 1) for t in range(len(x))]
            y = norm(x, w[f"{at}.input_layernorm.weight"], c.rms_norm_eps)
            if i < c.num_self_decoder_layers:
                x = x + self.window_attention(y, f"{at}.self_attn")
            else:
                x = x + self.cross_attention(y, f"{at}.cross_attn", key, value)
            y = norm(x, w[f"{at}.post_attention_layernorm.weight"], c.rms_norm_eps)
            gate, up = (y @ w[f"{at}.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
            x = x + (torch.nn.functional.silu(gate) * up) @ w[f"{at}.mlp.down_proj.weight"].T
        head = "model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"
        return norm(x, w["model.norm.weight"], c.rms_norm_eps) @ w[head].T

    def cross_attention(self, x: Tensor, at: str, key: Tensor, value: Tensor) -> Tensor:
        query = self.heads(x, f"{at}.q_proj.weight", f"{at}.q_norm.weight" if self.c.cross_qk_norm else None)
        cross = self.c.num_hidden_layers - self.c.num_self_decoder_layers
        rows = []
        for t, chosen in enumerate(self.selected):
            out, weight = attend_row(query[t], key[chosen], value[chosen])
            rows.append(out)
            log_index = self.score[t, chosen].log_softmax(-1)
            share = weight.mean(0) / (cross * len(x))
            self.index_loss = self.index_loss - (share * log_index).sum()
        return torch.stack(rows) @ self.w[f"{at}.o_proj.weight"].T
