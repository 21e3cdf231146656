"""A dense Transformer's folder, read as if it were a CLSA model's: the start of a conversion by training.

Owns which config field and tensor becomes which of CLSA's; what a dense model does not have is made by
`memory_start.py`. Layers 0..n-1 keep their attention and get a window, the others keep q and o and lose k and
v, everything else is copied. Names are the same but for `self_attn` -> `cross_attn`.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from megatron_clsa.convert.architecture import Architecture
from megatron_clsa.convert.imports import check_config, check_tensors
from megatron_clsa.convert.names import entries
from megatron_clsa.convert.weights import WeightFolder, rope_theta, rope_type
from megatron_clsa.errors import UserError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_QK_NORM, _QKV_BIAS = {"qwen3"}, {"qwen2"}
# What transformers takes where config.json is silent; elsewhere sizes follow from others.
_SILENT = {
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}


@dataclass(frozen=True)
class DenseChoices:
    """What the dense model does not say.

    Attributes:
        num_self_decoder_layers: layers that get a window; None for half of them.
        sliding_window: tokens that those see, the query's own included.
        ignore_rope_scaling: drop a RoPE scaling. Window layers see `sliding_window` positions, over which a
            scaling for long texts changes little, and the other layers lose their RoPE anyway.
    """

    num_self_decoder_layers: int | None = None
    sliding_window: int = 512
    index_topk: int = 2048
    index_head_dim: int = 128
    index_qk_norm: bool = False
    ignore_rope_scaling: bool = False


def dense_architecture(folder: WeightFolder, family: str, choices: DenseChoices) -> Architecture:
    """The CLSA model that `folder` becomes.

    Raises:
        UserError: if the folder is of another family, or has something that CLSA has no place for.
    """
    _check_family(folder, family, choices)
    config = _SILENT.get(family, {}) | folder.config
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    half = choices.num_self_decoder_layers
    half = layers // 2 if half is None else half
    if not 0 < half < layers:
        raise UserError(f"--num-self-decoder-layers {half}: give 1 to {layers - 1}, {folder} has {layers}")
    arch = Architecture(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_layers=layers,
        num_self_decoder_layers=half,
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads") or heads,
        kv_channels=config.get("head_dim") or config["hidden_size"] // heads,
        sliding_window=choices.sliding_window,
        index_topk=choices.index_topk,
        index_head_dim=choices.index_head_dim,
        index_qk_norm=choices.index_qk_norm,
        qk_layernorm=family in _QK_NORM,
        cross_qk_norm=family in _QK_NORM,
        layernorm_epsilon=config["rms_norm_eps"],
        rotary_base=rope_theta(config),
        tie_embeddings=config.get("tie_word_embeddings", False),
        max_position_embeddings=config["max_position_embeddings"],
        init_method_std=config.get("initializer_range", 0.02),
        add_qkv_bias=family in _QKV_BIAS,
        cross_attention="dense",  # the index is not trained yet
    )
    check_config(arch, folder.folder / "config.json")
    _check_weights(folder, arch)
    return arch


def _check_weights(folder: WeightFolder, arch: Architecture) -> None:
    """Refuse tensors that are missing or have another shape: transformers would make them up.

    With a window in every layer and no memory, CLSA's names are the dense model's.
    """
    if "embed_tokens.weight" in folder.names():
        raise UserError(f"{folder} holds a base model without its head: save the AutoModelForCausalLM")
    check_tensors(folder, list(entries(replace(arch, num_self_decoder_layers=arch.num_layers))), arch)


def _check_family(folder: WeightFolder, family: str, choices: DenseChoices) -> None:
    config, path = folder.config, folder.folder / "config.json"
    if config.get("model_type") != family:
        raise UserError(f"--init-from {family}: {path} says model_type {config.get('model_type')}")
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for key in (*needed, "rms_norm_eps", "max_position_embeddings"):
        if key not in config:
            raise UserError(f"{path} lacks {key}")
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"):  # sizes that others come from
        if type(config[key]) is not int or config[key] < 1:
            raise UserError(f"{path}: {key} is {config[key]!r}, not a positive whole number")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{path}: hidden_act {config['hidden_act']}; CLSA's MLP is SwiGLU (silu)")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise UserError(f"{path}: {key} is set; CLSA has biases on q, k and v only, as Qwen2")
    kind = rope_type(config)
    if kind != "default" and not choices.ignore_rope_scaling:
        raise UserError(f"{path}: RoPE scaling {kind}; pass --ignore-rope-scaling to train on without it")


def with_vocabulary_of(arch: Architecture, tokens: int | None, **fields) -> Architecture:
    """Rows that the tokenizer does not reach are cut: training pads the vocabulary by its own rule.

    Raises:
        UserError: if the tokenizer has more tokens than the model has rows.
    """
    if tokens is not None and tokens > arch.vocab_size:
        raise UserError(f"--tokenizer has {tokens} tokens, the model's vocabulary {arch.vocab_size}")
    return replace(arch, vocab_size=tokens or arch.vocab_size, **fields)


class DenseStart:
    """A `WeightSource` of CLSA's names over a dense model's folder.

    Args:
        made: the tensors that are not copied, by CLSA name.
    """

    def __init__(self, folder: WeightFolder, arch: Architecture, made: dict[str, Tensor]):
        self.folder, self.arch, self.made = folder, arch, made

    def __str__(self) -> str:
        return str(self.folder)

    def names(self) -> set[str]:
        there = self.folder.names()
        wanted = {name for entry in entries(self.arch) for name in entry.hf}
        return {name for name in wanted if name in self.made or _dense_name(name) in there}

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self.made:
            return tuple(self.made[name].shape)
        shape = self.folder.shape(_dense_name(name))
        return (min(shape[0], self.arch.vocab_size), *shape[1:]) if _has_tokens(name) else shape

    def read(self, name: str) -> Tensor:
        if name in self.made:
            return self.made[name]
        tensor = self.folder.read(_dense_name(name))
        return tensor[: self.arch.vocab_size] if _has_tokens(name) else tensor


def _dense_name(name: str) -> str:
    return name.replace(".cross_attn.", ".self_attn.")


def _has_tokens(name: str) -> bool:
    return name in ("model.embed_tokens.weight", "lm_head.weight")
