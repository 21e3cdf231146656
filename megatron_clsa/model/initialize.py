"""Weights that depend on the seed and a parameter's name alone, not on the parallel layout.

Owns drawing and slicing; the distributions are the config's. megatron-core draws each shard on its own:
one seed is another model at every layout (and the halves of a gated MLP are dealt out differently by each TP
size). Here the full tensor is drawn on the CPU from its own generator and each rank keeps its slice.
"""

import zlib

import torch
from torch import Tensor

_OUTPUT_PROJECTIONS = ("linear_proj.weight", "linear_fc2.weight")
_EMBEDDING = "embedding.word_embeddings.weight"


@torch.no_grad()
def initialize_weights(model, seed: int) -> None:
    """Draw every matrix of a pipeline stage anew; norm weights stay at one.

    Args:
        model: a `CLSAModel`.
        seed: of the whole run, the same on all ranks.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            full = _draw(
                _global_name(name, model), _full_shape(parameter, model.tp_group), model.config, seed
            )
            parameter.copy_(_own_slice(full, name, parameter, model.tp_group))


def _global_name(name: str, model) -> str:
    """The name in checkpoints: layers counted over the whole model, a tied output layer as the embedding."""
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return _EMBEDDING
    if name.startswith("decoder.layers."):
        _, _, layer, rest = name.split(".", 3)
        return f"decoder.layers.{model.decoder.first_layer + int(layer)}.{rest}"
    return name


def _draw(name: str, shape: list[int], config, seed: int) -> Tensor:
    if name.endswith(_OUTPUT_PROJECTIONS):
        method = config.output_layer_init_method
    else:
        method = config.embedding_init_method if name == _EMBEDDING else config.init_method
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        return method(torch.empty(shape, dtype=torch.float32, device="cpu"))


def _is_split(parameter: Tensor) -> bool:
    return getattr(parameter, "tensor_model_parallel", False)


def _full_shape(parameter: Tensor, tp_group) -> list[int]:
    shape = list(parameter.shape)
    if _is_split(parameter):
        shape[parameter.partition_dim] *= tp_group.size()
    return shape


def _own_slice(full: Tensor, name: str, parameter: Tensor, tp_group) -> Tensor:
    if not _is_split(parameter):
        return full
    size, rank = tp_group.size(), tp_group.rank()
    if name.endswith("linear_fc1.weight"):  # gate and up are each split, as checkpoints hold them
        return torch.cat([half.chunk(size)[rank] for half in full.chunk(2)])
    return full.chunk(size, dim=parameter.partition_dim)[rank]
