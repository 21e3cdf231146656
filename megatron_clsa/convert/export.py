"""Writes a Hugging Face folder: weights shard by shard, config, the model's own code, tokenizer, card.

Owns the folder's content; that it appears whole or not at all is `whole_folder.py`'s. Nothing loads the
folder without `config.json`, so that the caller writes it last, when all that could stop an export is over,
`--verify` included. Peak memory: the largest tensor, and a second one of its size.
"""

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_clsa.convert import manifest
from megatron_clsa.convert.architecture import Architecture
from megatron_clsa.convert.card import model_card
from megatron_clsa.convert.checkpoint import TorchDistReader
from megatron_clsa.convert.names import Entry, entries
from megatron_clsa.convert.safetensors_file import DTYPES, Planned, SafetensorsWriter
from megatron_clsa.convert.tokenizer import write_tokenizer
from megatron_clsa.convert.weights import INDEX
from megatron_clsa.errors import UserError

CODE_FILES = tuple(
    f"{name}_clsa.py" for name in ("configuration", "modeling", "layers", "attention", "kernels")
)


@dataclass(frozen=True)
class ExportOptions:
    """What the user chooses.

    Attributes:
        dtype: of the written weights; None keeps each tensor's.
        max_shard_bytes: upper limit of a safetensors file, unless one tensor alone is larger.
        tokenizer: folder or SentencePiece file; None writes no tokenizer.
        run: folder of the training run, for the model card.
    """

    dtype: torch.dtype | None = None
    max_shard_bytes: int = 5 * 10**9
    tokenizer: Path | None = None
    run: Path | None = None


def check_tensors(reader: TorchDistReader, arch: Architecture) -> list[Entry]:
    """The name table of `arch`, once every tensor is known to be there in its shape.

    Raises:
        UserError: naming the first tensor that is missing, has another shape or is not the model's.
    """
    table, shapes = list(entries(arch)), reader.shapes()
    for entry in table:
        found = shapes.pop(entry.megatron, None)
        if found is None:
            raise UserError(f"{reader.folder} lacks {entry.megatron}: not the model that its clsa.json tells")
        rows_fit = found[0] >= entry.shape[0] if entry.padded else found[0] == entry.shape[0]
        if not rows_fit or found[1:] != entry.shape[1:]:
            raise UserError(
                f"{reader.folder}: {entry.megatron} has shape {list(found)}, its clsa.json tells "
                f"{list(entry.shape)}"
            )
        if reader.dtype(entry.megatron) not in DTYPES:
            kind = reader.dtype(entry.megatron)
            raise UserError(f"{reader.folder}: {entry.megatron} is {kind}, no float; take another checkpoint")
    if shapes:
        raise UserError(f"{reader.folder} holds {min(shapes)}, which a CLSA model does not have")
    return table


def export(
    reader: TorchDistReader,
    arch: Architecture,
    out: Path,
    options: ExportOptions,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict:
    """Fill the existing folder `out`, which the caller makes visible. `progress(bytes written, of all)`.

    Returns what `write_config` makes the folder loadable with.
    """
    table = check_tensors(reader, arch)
    ids = write_tokenizer(options.tokenizer, out, arch.vocab_size) if options.tokenizer else {}
    dtypes = {entry.megatron: options.dtype or reader.dtype(entry.megatron) for entry in table}
    _write_json(out / "generation_config.json", {"_from_model_config": True, "do_sample": False} | ids)
    code = Path(importlib.util.find_spec("megatron_clsa").origin).parent / "hf"
    for name in CODE_FILES:
        shutil.copyfile(code / name, out / name)
    (out / "README.md").write_text(model_card(arch, options.run))
    shards = _shards(table, dtypes, options.max_shard_bytes)
    _write_weights(_hf_tensors(reader, table), shards, out, progress)
    return hf_config(arch, dtypes[table[0].megatron], ids)


def write_config(out: Path, config: dict) -> None:
    """Write `config.json`, whole or not at all."""
    manifest.write_whole(out / "config.json", json.dumps(config, indent=2) + "\n")


def hf_config(arch: Architecture, dtype: torch.dtype, token_ids: dict[str, int]) -> dict:
    """`config.json` (design: docs/convert.md). `layer_types` tells transformers' caches what to keep."""
    cross = arch.num_layers - arch.num_self_decoder_layers
    return {
        "model_type": "clsa",
        "architectures": ["CLSAForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_clsa.CLSAConfig",
            "AutoModel": "modeling_clsa.CLSAModel",
            "AutoModelForCausalLM": "modeling_clsa.CLSAForCausalLM",
        },
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.ffn_hidden_size,
        "num_hidden_layers": arch.num_layers,
        "num_self_decoder_layers": arch.num_self_decoder_layers,
        "num_attention_heads": arch.num_attention_heads,
        "num_key_value_heads": arch.num_query_groups,
        "head_dim": arch.kv_channels,
        "hidden_act": "silu",
        "rms_norm_eps": arch.layernorm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(arch.rotary_base)},
        "sliding_window": arch.sliding_window,
        "attention_bias": arch.add_qkv_bias,
        "use_qk_norm": arch.qk_layernorm,
        "cross_qk_norm": arch.cross_qk_norm,
        "index_head_dim": arch.index_head_dim,
        "index_topk": arch.index_topk,
        "index_qk_norm": arch.index_qk_norm,
        "cross_attention": arch.cross_attention,
        "indexer_loss_coef": arch.indexer_loss_coef,
        "max_position_embeddings": arch.max_position_embeddings,
        "tie_word_embeddings": arch.tie_embeddings,
        "initializer_range": arch.init_method_std,
        "layer_types": ["sliding_attention"] * arch.num_self_decoder_layers
        + ["deepseek_sparse_attention"] * cross,
        "num_kv_shared_layers": cross - 1,
        **token_ids,
    }


def _write_weights(tensors: Iterator, shards: list[dict[str, Planned]], out: Path, progress) -> None:
    index, done = {}, 0
    total = sum(plan.nbytes for shard in shards for plan in shard.values())
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
        with closing(SafetensorsWriter(out / file, shard)) as writer:
            for name, plan in shard.items():
                writer.add(*next(tensors))
                index[name] = file
                done += plan.nbytes
                progress(done, total)
            writer.finish()
    _write_json(out / INDEX, {"metadata": {"total_size": done}, "weight_map": index})
    manifest.seal(out, {name: manifest.describe(out / name) for name in (*names, INDEX)}, {})


def _hf_tensors(reader, table: list[Entry]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in turn; what is handed out is not kept while the next one is read."""
    for entry in table:
        parts = entry.split(reader.read(entry.megatron))
        for name in entry.hf:
            yield name, parts.pop(0)


def _shards(table: list[Entry], dtypes: dict[str, torch.dtype], limit: int) -> list[dict[str, Planned]]:
    """Each file's tensors, in order. `dtypes` by Megatron name."""
    shards, used = [{}], 0
    for entry in table:
        parts = entry.split(torch.empty(entry.shape, device="meta"))
        for name, part in zip(entry.hf, parts, strict=True):
            plan = Planned(tuple(part.shape), dtypes[entry.megatron])
            if shards[-1] and used + plan.nbytes > limit:
                shards.append({})
                used = 0
            shards[-1][name] = plan
            used += plan.nbytes
    return shards


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
