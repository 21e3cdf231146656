"""First values of what a dense Transformer does not have: one memory for many layers, and the index.

Owns which tensor is made how; the mathematics is `shared_heads.py`'s, running a model `calibrate.py`'s.
Axis letters: H hidden, h query heads, g groups, d head dim.

The dense layers have keys and values of their own, K_l and V_l, and rotate keys by position. The memory has
one K, one V, no rotation. Whatever linear map turns the memory into layer l's K or V goes into its q or o.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_clsa.convert.architecture import Architecture
from megatron_clsa.convert.shared_heads import Moments, fit_shared_heads, mean_rotation, rotate_heads

METHODS = ("aligned", "mean", "first", "random")
POSITIONS = ("average", "drop")
Read = Callable[[str], Tensor]


class MemoryStart:
    """Makes every tensor of a CLSA start that is not a copy.

    Args:
        read: a dense tensor by its name.
        method, position: how; see `METHODS` and `POSITIONS`.
        span: distances that "average" averages over.
        moments: of the calibration text; None unless the method is "aligned".
    """

    def __init__(
        self,
        read: Read,
        arch: Architecture,
        method: str,
        position: str,
        span: int,
        seed: int,
        moments: Moments | None = None,
    ):
        self.read, self.arch, self.method, self.moments = read, arch, method, moments
        self.layers = range(arch.num_self_decoder_layers, arch.num_layers)
        ones = torch.ones(arch.kv_channels // 2, dtype=torch.complex128)
        self.turn = mean_rotation(arch.kv_channels, arch.rotary_base, span) if position == "average" else ones
        self.generator = torch.Generator().manual_seed(seed)
        self.kept: dict[str, float] = {}

    def make(self) -> dict[str, Tensor]:
        """All tensors by CLSA name, in the dense model's dtype."""
        made = self._indexer() | self._norms()
        for part in "kv":
            aligned = self.method == "aligned" and not (part == "k" and self.arch.qk_layernorm)
            made |= self._align(part) if aligned else self._copy(part)
        dtype = self.read("model.norm.weight").dtype
        return {name: tensor.to(dtype).contiguous() for name, tensor in made.items()}

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator) * self.arch.init_method_std

    def _indexer(self) -> dict[str, Tensor]:
        """Random: the warm-up phase trains it, and nothing in a dense model resembles it."""
        arch, made = self.arch, {}
        for part in "qk":
            name = f"model.memory.indexer.{part}"
            made[f"{name}_proj.weight"] = self._random(arch.index_head_dim, arch.hidden_size)
            if arch.index_qk_norm:
                made[f"{name}_norm.weight"] = torch.ones(arch.index_head_dim)
        return made

    def _norms(self) -> dict[str, Tensor]:
        """Ones: the layers' own input norms are folded into what reads the memory.

        With QK-norm, the product of both norms' weights moves to the query: without RoPE in between only the
        product matters, so every layer keeps its own, and the mean rotation's real part with it.
        """
        made = {"model.memory.norm.weight": torch.ones(self.arch.hidden_size)}
        if self.arch.cross_qk_norm:
            made["model.memory.k_norm.weight"] = torch.ones(self.arch.kv_channels)
            scale = self.turn.real.repeat(2)
            for layer in self.layers:
                norms = (self.read(f"model.layers.{layer}.self_attn.{p}_norm.weight").double() for p in "qk")
                made[f"model.layers.{layer}.cross_attn.q_norm.weight"] = next(norms) * next(norms) * scale
        return made

    def _folded(self, layer: int, part: str) -> Tensor:
        """A dense key or value projection that takes an input without the norm's weight."""
        norm = self.read(f"model.layers.{layer}.input_layernorm.weight").double()
        return self.read(f"model.layers.{layer}.self_attn.{part}_proj.weight").double() * norm

    def _copy(self, part: str) -> dict[str, Tensor]:
        """The memory from the dense projections alone: their mean, the first one, or nothing of them."""
        arch, name = self.arch, f"model.memory.{part}_proj"
        width = arch.num_query_groups * arch.kv_channels
        made = self._turned_queries() if part == "k" else {}
        if self.method == "random":
            made[f"{name}.weight"] = self._random(width, arch.hidden_size)
            return made | ({f"{name}.bias": torch.zeros(width)} if arch.add_qkv_bias else {})
        layers = self.layers[:1] if self.method == "first" else self.layers
        made[f"{name}.weight"] = sum(self._folded(layer, part) for layer in layers) / len(layers)
        if arch.add_qkv_bias:
            biases = (self.read(f"model.layers.{n}.self_attn.{part}_proj.bias").double() for n in layers)
            made[f"{name}.bias"] = sum(biases) / len(layers)
        return made

    def _turned_queries(self) -> dict[str, Tensor]:
        """q_proj times the mean rotation. QK-norm would undo its scale; `_norms` holds it there."""
        if self.arch.cross_qk_norm or bool((self.turn == 1).all()):
            return {}
        made = {}
        for layer in self.layers:
            for kind in self._kinds():
                query = self._query(layer, kind)
                made[f"model.layers.{layer}.cross_attn.q_proj.{kind}"] = rotate_heads(
                    query, self.turn
                ).flatten(0, 1)
        return made

    def _kinds(self) -> tuple[str, ...]:
        return ("weight", "bias") if self.arch.add_qkv_bias else ("weight",)

    def _query(self, layer: int, kind: str) -> Tensor:
        """`[h, d, H]`, or `[h, d]` for the bias."""
        tensor = self.read(f"model.layers.{layer}.self_attn.q_proj.{kind}").double()
        return tensor.unflatten(0, (self.arch.num_attention_heads, -1))

    def _align(self, part: str) -> dict[str, Tensor]:
        """One projection fitted to all layers' heads; each layer's way back goes into its q or o."""
        arch, moments = self.arch, self.moments
        target = moments.key if part == "k" else moments.value
        if part == "k":  # rank the directions by what the scores without positions can use
            target = target * self.turn.abs().repeat(2)
        fit = fit_shared_heads(moments.xx, target, arch.add_qkv_bias)
        self.kept[part] = fit.kept
        weight = fit.weight.transpose(1, 2).flatten(0, 1)
        made = {f"model.memory.{part}_proj.weight": weight[:, :-1]}
        if arch.add_qkv_bias:
            made[f"model.memory.{part}_proj.bias"] = weight[:, -1]
        per_group = arch.num_attention_heads // arch.num_query_groups
        for number, layer in enumerate(self.layers):
            mixing = fit.mixing[number].repeat_interleave(per_group, dim=0)
            made |= self._absorb_key(layer, mixing) if part == "k" else self._absorb_value(layer, mixing)
        return made

    def _absorb_key(self, layer: int, mixing: Tensor) -> dict[str, Tensor]:
        """q . (s M) = (M q) . s. mixing: `[h, d, d]`."""
        phase = torch.where(self.turn == 0, 1, self.turn / self.turn.abs().clamp(min=1e-30))
        made = {}
        for kind in self._kinds():
            query = rotate_heads(self._query(layer, kind), phase)
            mixed = torch.einsum("hij,hj...->hi...", mixing, query)
            made[f"model.layers.{layer}.cross_attn.q_proj.{kind}"] = mixed.flatten(0, 1)
        return made

    def _absorb_value(self, layer: int, mixing: Tensor) -> dict[str, Tensor]:
        """o (s M)^T = (o M^T) s^T."""
        output = self.read(f"model.layers.{layer}.self_attn.o_proj.weight").double()
        by_head = output.unflatten(1, (self.arch.num_attention_heads, -1))
        mixed = torch.einsum("ohj,hij->ohi", by_head, mixing)
        return {f"model.layers.{layer}.cross_attn.o_proj.weight": mixed.flatten(1)}
