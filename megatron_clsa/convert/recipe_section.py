"""`model.yaml` beside a start checkpoint: the part of a recipe that must agree with its weights.

Owns the flags' names for `clsa.json`'s fields; the recipe's own rules are megatron_clsa/training/recipe.py's.
"""

from pathlib import Path

import yaml

from megatron_clsa.convert.architecture import Architecture

FILE = "model.yaml"
_SAME = (
    "num_layers",
    "num_self_decoder_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "qk_layernorm",
    "cross_qk_norm",
    "add_qkv_bias",
    "sliding_window",
    "index_topk",
    "index_head_dim",
    "index_qk_norm",
    "max_position_embeddings",
    "init_method_std",
)


def write_recipe_section(arch: Architecture, folder: Path) -> None:
    """Write `folder/model.yaml`, to be copied to the top of a recipe."""
    model = {name: getattr(arch, name) for name in _SAME}
    model |= {"norm_epsilon": arch.layernorm_epsilon, "rotary_base": int(arch.rotary_base)}
    model["untie_embeddings_and_output_weights"] = not arch.tie_embeddings
    sections: dict[str, dict] = {"model": model}
    if arch.tokenizer_model:
        sections["data"] = {"tokenizer_type": arch.tokenizer_type, "tokenizer_model": arch.tokenizer_model}
    head = "# The model that this checkpoint holds, and its tokenizer: the top of a recipe for distill.py.\n"
    (folder / FILE).write_text(head + yaml.safe_dump(sections, sort_keys=False))
