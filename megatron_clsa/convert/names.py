"""The one table between the two worlds: a Megatron tensor, its Hugging Face tensors, and how to cut or join.

Owns names and layouts, both directions from the same entry. Reads and writes nothing.
Axis letters: V vocabulary (padded in Megatron), H hidden, F ffn, h query heads, g groups, d head dim.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_clsa.convert.architecture import Architecture


@dataclass(frozen=True)
class Entry:
    """One tensor of a Megatron checkpoint.

    Attributes:
        megatron: its name there.
        hf: names of the tensors that it becomes.
        shape: its shape there; a vocabulary's first axis may be longer by padding.
        split: Megatron tensor to as many tensors as `hf` names.
        join: the inverse.
        padded: whether the first axis is a vocabulary.
    """

    megatron: str
    hf: tuple[str, ...]
    shape: tuple[int, ...]
    split: Callable[[Tensor], list[Tensor]]
    join: Callable[[list[Tensor]], Tensor]
    padded: bool = False


def entries(arch: Architecture) -> Iterator[Entry]:
    """All tensors of a model, embedding first, in the order of a forward pass."""
    hidden = arch.hidden_size
    yield _vocabulary("embedding.word_embeddings.weight", "model.embed_tokens.weight", arch)
    for i in range(arch.num_layers):
        if i == arch.num_self_decoder_layers:
            yield from _memory(arch)
        ours, theirs = f"decoder.layers.{i}", f"model.layers.{i}"
        if i < arch.num_self_decoder_layers:
            yield from _window_layer(f"{ours}.self_attention", theirs, arch)
        else:
            yield from _cross_layer(f"{ours}.cross_attention", theirs, arch)
        yield _whole(
            f"{ours}.mlp.linear_fc1.layer_norm_weight", f"{theirs}.post_attention_layernorm.weight", hidden
        )
        gate_up = tuple(f"{theirs}.mlp.{part}_proj.weight" for part in ("gate", "up"))
        yield Entry(
            f"{ours}.mlp.linear_fc1.weight",
            gate_up,
            (2 * arch.ffn_hidden_size, hidden),
            lambda fused: list(fused.chunk(2)),
            torch.cat,
        )
        yield _whole(
            f"{ours}.mlp.linear_fc2.weight",
            f"{theirs}.mlp.down_proj.weight",
            hidden,
            arch.ffn_hidden_size,
        )
    yield _whole("decoder.final_layernorm.weight", "model.norm.weight", hidden)
    if not arch.tie_embeddings:
        yield _vocabulary("output_layer.weight", "lm_head.weight", arch)


def _window_layer(ours: str, theirs: str, arch: Architecture) -> Iterator[Entry]:
    hidden, width = arch.hidden_size, arch.kv_channels
    yield _whole(f"{ours}.linear_qkv.layer_norm_weight", f"{theirs}.input_layernorm.weight", hidden)
    per_group = arch.num_attention_heads // arch.num_query_groups
    yield _grouped(
        f"{ours}.linear_qkv.weight",
        tuple(f"{theirs}.self_attn.{part}_proj.weight" for part in "qkv"),
        (per_group, 1, 1),
        arch,
        (hidden,),
    )
    if arch.add_qkv_bias:
        biases = tuple(f"{theirs}.self_attn.{part}_proj.bias" for part in "qkv")
        yield _grouped(f"{ours}.linear_qkv.bias", biases, (per_group, 1, 1), arch)
    if arch.qk_layernorm:
        for part in "qk":
            yield _whole(f"{ours}.{part}_layernorm.weight", f"{theirs}.self_attn.{part}_norm.weight", width)
    yield _whole(
        f"{ours}.linear_proj.weight",
        f"{theirs}.self_attn.o_proj.weight",
        hidden,
        arch.num_attention_heads * width,
    )


def _cross_layer(ours: str, theirs: str, arch: Architecture) -> Iterator[Entry]:
    hidden, width = arch.hidden_size, arch.kv_channels
    inner = arch.num_attention_heads * width
    yield _whole(f"{ours}.linear_q.layer_norm_weight", f"{theirs}.input_layernorm.weight", hidden)
    yield _whole(f"{ours}.linear_q.weight", f"{theirs}.cross_attn.q_proj.weight", inner, hidden)
    if arch.add_qkv_bias:
        yield _whole(f"{ours}.linear_q.bias", f"{theirs}.cross_attn.q_proj.bias", inner)
    if arch.cross_qk_norm:
        yield _whole(f"{ours}.q_layernorm.weight", f"{theirs}.cross_attn.q_norm.weight", width)
    yield _whole(f"{ours}.linear_proj.weight", f"{theirs}.cross_attn.o_proj.weight", hidden, inner)


def _memory(arch: Architecture) -> Iterator[Entry]:
    hidden = arch.hidden_size
    yield _whole("memory.norm.weight", "model.memory.norm.weight", hidden)
    key_value = tuple(f"model.memory.{part}_proj.weight" for part in "kv")
    yield _grouped("memory.linear_kv.weight", key_value, (1, 1), arch, (hidden,))
    if arch.add_qkv_bias:
        biases = tuple(f"model.memory.{part}_proj.bias" for part in "kv")
        yield _grouped("memory.linear_kv.bias", biases, (1, 1), arch)
    if arch.cross_qk_norm:
        yield _whole("memory.k_layernorm.weight", "model.memory.k_norm.weight", arch.kv_channels)
    for part in "qk":
        ours, theirs = f"memory.indexer.linear_{part}.weight", f"model.memory.indexer.{part}_proj.weight"
        yield _whole(ours, theirs, arch.index_head_dim, hidden)
        if arch.index_qk_norm:
            ours, theirs = (
                f"memory.indexer.{part}_layernorm.weight",
                f"model.memory.indexer.{part}_norm.weight",
            )
            yield _whole(ours, theirs, arch.index_head_dim)


def _whole(megatron: str, hf: str, *shape: int) -> Entry:
    return Entry(megatron, (hf,), shape, lambda tensor: [tensor], lambda parts: parts[0])


def _grouped(
    megatron: str,
    hf: tuple[str, ...],
    heads: tuple[int, ...],
    arch: Architecture,
    inputs: tuple[int, ...] = (),
) -> Entry:
    """`[g * sum(heads) * d, *inputs]`, interleaved by group, to one `[g * n * d, *inputs]` for each n."""
    groups, width = arch.num_query_groups, arch.kv_channels

    def split(fused: Tensor) -> list[Tensor]:
        by_group = fused.view(groups, sum(heads), width, *inputs)
        return [part.reshape(-1, *inputs) for part in by_group.split(heads, dim=1)]

    def join(parts: list[Tensor]) -> Tensor:
        by_group = [p.view(groups, n, width, *inputs) for p, n in zip(parts, heads, strict=True)]
        return torch.cat(by_group, dim=1).reshape(-1, *inputs)

    return Entry(megatron, hf, (groups * sum(heads) * width, *inputs), split, join)


def _vocabulary(megatron: str, hf: str, arch: Architecture) -> Entry:
    """Padding rows go on export; on import the writer adds what its layout asks for."""
    return Entry(
        megatron,
        (hf,),
        (arch.vocab_size, arch.hidden_size),
        lambda tensor: [tensor[: arch.vocab_size]],
        lambda parts: parts[0],
        padded=True,
    )
