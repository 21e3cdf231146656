"""`clsa.json`: what a checkpoint is a checkpoint of, so that converting and resuming need no other source.

Owns the fields, their file and the comparison of two of them. Knows no tensor and imports no megatron.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megatron_clsa.errors import UserError

FILE = "clsa.json"
_FORMAT = "megatron_clsa architecture 1"
# A later phase may change these: no weight depends on them.
_FREE = {"max_position_embeddings", "index_topk", "sliding_window", "rotary_base", "init_method_std"}
_FREE |= {"tokenizer_type", "tokenizer_model", "cross_attention", "indexer_loss_coef"}


@dataclass(frozen=True)
class Architecture:
    """A CLSA model's shape. Sizes are global (of all ranks together) and in elements.

    Attributes:
        vocab_size: tokens of the tokenizer; the checkpoint's embedding may have padding rows after them.
        num_query_groups: key/value heads, of the window layers and of the shared memory.
        kv_channels: size of a head.
        sliding_window: tokens that a window layer sees, the query's own included.
        index_topk: positions that the index selects (of the phase that wrote the checkpoint).
        add_qkv_bias: whether q, k and v have biases (Qwen2), in the window layers, cross layers and memory.
        tokenizer_model: path of the tokenizer at training time; None where it has no file.
        cross_attention: "sparse" or "dense", as the phase that wrote the checkpoint read the memory.
        indexer_loss_coef: of a folder that was fine-tuned; training here has its own weights of losses.
    """

    vocab_size: int
    hidden_size: int
    ffn_hidden_size: int
    num_layers: int
    num_self_decoder_layers: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    sliding_window: int
    index_topk: int
    index_head_dim: int
    index_qk_norm: bool
    qk_layernorm: bool
    cross_qk_norm: bool
    layernorm_epsilon: float
    rotary_base: float
    tie_embeddings: bool
    max_position_embeddings: int
    init_method_std: float = 0.02
    add_qkv_bias: bool = False
    tokenizer_type: str | None = None
    tokenizer_model: str | None = None
    cross_attention: str = "sparse"
    indexer_loss_coef: float = 0.0

    @classmethod
    def of(cls, config, **others) -> "Architecture":
        """From a `megatron_clsa.config.CLSAConfig` and what it does not hold (vocabulary, tying, ...)."""
        held = {f.name: getattr(config, f.name) for f in fields(cls) if hasattr(config, f.name)}
        return cls(**held | others)

    def write(self, folder: Path) -> None:
        """Write `folder/clsa.json`, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        whole = folder / f"{FILE}.tmp"
        whole.write_text(json.dumps({"format": _FORMAT} | asdict(self), indent=1) + "\n")
        os.replace(whole, folder / FILE)


def read_architecture(folder: Path) -> Architecture:
    """Read the `clsa.json` of a checkpoint, which lies in its folder or in the one above.

    Raises:
        UserError: if there is none, or it is not one of ours.
    """
    path = next((p for p in (folder / FILE, folder.parent / FILE) if p.is_file()), None)
    if path is None:
        raise UserError(f"{folder} has no {FILE}: not a CLSA checkpoint, or copied without that file")
    try:
        values = json.loads(path.read_text())
        if values.pop("format") != _FORMAT:
            raise KeyError("format")
        arch = Architecture(**values)
        if fault := faulty_field(arch):
            raise ValueError(" ".join(fault))
        return arch
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged or of another version: {error}") from None


def faulty_field(arch: Architecture) -> tuple[str, str] | None:
    """The first field that no model can have and what it is; None if all are sound."""
    for field in fields(Architecture):
        value = getattr(arch, field.name)
        if field.type is int and (type(value) is not int or value < 1):
            return field.name, f"is {value!r}, not a positive whole number"
        if field.type is bool and type(value) is not bool:
            return field.name, f"is {value!r}, neither true nor false"
        off = field.name == "indexer_loss_coef" and value == 0
        if field.type is float and not off and not (type(value) in (int, float) and 0 < value < math.inf):
            return field.name, f"is {value!r}, not a positive number"
    if arch.cross_attention not in ("sparse", "dense"):
        return "cross_attention", f"is {arch.cross_attention!r}, neither 'sparse' nor 'dense'"
    if arch.num_self_decoder_layers >= arch.num_layers:
        return "num_self_decoder_layers", f"is {arch.num_self_decoder_layers} of {arch.num_layers} layers"
    if arch.num_attention_heads % arch.num_query_groups:
        return "num_query_groups", f"{arch.num_query_groups} does not divide {arch.num_attention_heads} heads"
    if arch.kv_channels % 2:
        return "kv_channels", f"is {arch.kv_channels}: RoPE needs an even one"
    return None


def check_same_architecture(found: Architecture, wanted: dict, source: Path) -> None:
    """Refuse weights of another model. `wanted` holds the fields that are known so far.

    Raises:
        UserError: naming the first field that differs, both values and the checkpoint.
    """
    for name, value in wanted.items():
        if name not in _FREE and getattr(found, name) != value:
            raise UserError(
                f"{source} is a checkpoint of another architecture: its {name} is {getattr(found, name)}, "
                f"this run's is {value}; give its values or another checkpoint"
            )
