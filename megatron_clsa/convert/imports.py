"""The way back: a CLSA folder of Hugging Face's kind to a checkpoint that training starts from.

Owns the mapping of config.json to `clsa.json` and the check that every tensor is there in its shape. Names
and layouts are `names.py`'s, the checkpoint's format `dist_writer.py`'s. Needs no megatron.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_clsa.convert.architecture import Architecture, faulty_field
from megatron_clsa.convert.dist_writer import TorchDistWriter
from megatron_clsa.convert.names import Entry, entries
from megatron_clsa.convert.recipe_section import write_recipe_section
from megatron_clsa.convert.tokenizer import check_tokens, count_tokens
from megatron_clsa.convert.weights import WeightFolder, rope_theta, rope_type
from megatron_clsa.errors import UserError

HF_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_self_decoder_layers": "num_self_decoder_layers",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "sliding_window": "sliding_window",
    "index_topk": "index_topk",
    "index_head_dim": "index_head_dim",
    "index_qk_norm": "index_qk_norm",
    "qk_layernorm": "use_qk_norm",
    "cross_qk_norm": "cross_qk_norm",
    "layernorm_epsilon": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "max_position_embeddings": "max_position_embeddings",
    "init_method_std": "initializer_range",
    "add_qkv_bias": "attention_bias",
}

_BUFFERS = (".rotary_emb.inv_freq",)  # older versions of transformers saved it; it follows from the config
# Where config.json is silent, the model's own defaults.
_SILENT = {"cross_attention": "sparse", "indexer_loss_coef": 0.0}


class WeightSource(Protocol):
    """Anything that has a CLSA model's tensors under their Hugging Face names."""

    def names(self) -> set[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> Tensor: ...


def architecture_of(folder: WeightFolder, tokenizer: Path | None) -> Architecture:
    """The fields of `clsa.json`.

    Raises:
        UserError: if the folder holds another kind of model, lacks a field or does not fit the tokenizer.
    """
    config, path = folder.config, folder.folder / "config.json"
    kind = config.get("model_type")
    if kind != "clsa":
        raise UserError(f"{path}: model_type is {kind}, not clsa; a dense model is read with --init-from")
    missing = [theirs for theirs in HF_FIELDS.values() if theirs not in config]
    if missing:
        raise UserError(f"{path} lacks {missing[0]}")
    if config.get("hidden_act") != "silu" or rope_type(config) != "default":
        raise UserError(f"{path}: training knows hidden_act silu and rope_type default only")
    arch = Architecture(
        **{ours: config[theirs] for ours, theirs in HF_FIELDS.items()},
        rotary_base=rope_theta(config),
        **{name: config.get(name, default) for name, default in _SILENT.items()},
        **tokenizer_fields(tokenizer),
    )
    check_config(arch, path)
    if tokenizer is not None:
        check_tokens(tokenizer, count_tokens(tokenizer), arch.vocab_size)
    return arch


def check_config(arch: Architecture, path: Path) -> None:
    """Refuse what no model can have, by its name in the `config.json` at `path`."""
    if fault := faulty_field(arch):
        raise UserError(f"{path}: {HF_FIELDS.get(fault[0], fault[0])} {fault[1]}")
    if arch.rotary_base != int(arch.rotary_base):
        raise UserError(
            f"{path}: rope_theta is {arch.rotary_base}; training's --rotary-base is a whole number"
        )


def tokenizer_fields(tokenizer: Path | None) -> dict[str, str]:
    """How `clsa.json` names a tokenizer: Megatron's type and an absolute path."""
    if tokenizer is None:
        return {}
    kind = "HuggingFaceTokenizer" if tokenizer.is_dir() else "SentencePieceTokenizer"
    return {"tokenizer_type": kind, "tokenizer_model": str(tokenizer.resolve())}


def write_checkpoint(
    source: WeightSource,
    arch: Architecture,
    out: Path,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Fill the existing folder `out`, which becomes a checkpoint when the caller writes `arch` into it.

    Args:
        dtype: None keeps each tensor's.
        progress: called with the number of tensors done and of all.
    """
    table = list(entries(arch))
    check_tensors(source, table, arch)
    with closing(TorchDistWriter(out)) as writer:
        for number, entry in enumerate(table, start=1):
            whole = entry.join([source.read(name) for name in entry.hf])  # of the widest dtype among them
            writer.add(entry.megatron, whole if dtype is None else whole.to(dtype))
            progress(number, len(table))
        writer.finish()
    write_recipe_section(arch, out)


def check_tensors(source: WeightSource, table: list[Entry], arch: Architecture) -> None:
    """Refuse a source that has other tensors than `table`, or in other shapes.

    Raises:
        UserError: naming the first one.
    """
    left = {name for name in source.names() if not name.endswith(_BUFFERS)}
    for name, shape in _hf_shapes(table):
        if name not in left:
            raise UserError(f"{source} lacks {name}: not the model that its config.json tells")
        if source.shape(name) != shape:
            raise UserError(
                f"{source}: {name} has shape {list(source.shape(name))}, its config.json tells {list(shape)}"
            )
        left.discard(name)
    if arch.tie_embeddings:
        left.discard("lm_head.weight")
    if left:
        raise UserError(f"{source} holds {min(left)}, which the model of its config.json does not have")


def _hf_shapes(table: list[Entry]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for entry in table:
        parts = entry.split(torch.empty(entry.shape, device="meta"))
        yield from ((name, tuple(part.shape)) for name, part in zip(entry.hf, parts, strict=True))
