"""What the teacher needs of any causal LM of transformers: its trunk, its layers, its weights over ranks.

Owns everything that depends on how transformers builds its models; no targets and no choice of sizes.
"""

import torch
from torch import Tensor


class _RowsOut:
    """What a trunk returns, with the last states alone; whatever else a family looks for is None."""

    def __init__(self, rows: Tensor):
        self.last_hidden_state = rows

    def __getitem__(self, place):
        return (self.last_hidden_state,)[place]

    def __getattr__(self, name: str) -> None:
        return None


class _Rows(torch.nn.Module):
    """In place of a trunk: its output is its input."""

    def forward(self, *args, inputs_embeds: Tensor, **named) -> _RowsOut:
        return _RowsOut(inputs_embeds)


def take_trunk(model) -> torch.nn.Module:
    """Everything before the output matrix. What stays in `model` turns rows of it into logits.

    So logits are made in blocks, with what some families do to them behind the matrix (a soft cap, a scale).
    """
    trunk = model.base_model
    setattr(model, model.base_model_prefix, _Rows())
    return trunk


def layers_of(trunk) -> torch.nn.ModuleList:
    """Named `layers` in most families, `h` or `blocks` in some."""
    lists = (part for part in trunk.modules() if isinstance(part, torch.nn.ModuleList))
    return next(part for part in lists if len(part) == trunk.config.num_hidden_layers)


def shard_layers(model, group, device_type: str) -> None:
    """Each rank keeps its part of a layer's weights and gathers the layer when it runs."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    mesh = DeviceMesh.from_group(group, device_type)
    for layer in layers_of(model.base_model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)


def split_heads(model, group, device_type: str) -> None:
    """Each rank keeps its heads, its part of every MLP and of the vocabulary, by the model's own plan.

    `from_pretrained` does this only for one group of the whole world, hence the step after it. Our output
    layer stays split where the plan would gather all logits; tied embeddings stay whole on every rank.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    model.tp_plan = {**model.tp_plan, head: "colwise"}
    apply_tensor_parallelism(model, DeviceMesh.from_group(group, device_type))


@torch.no_grad()
def keeps_documents_apart(trunk, device) -> bool:
    """Whether a second document's states stay the same under another first document.

    Most families read from restarting position ids where a document ends; some, with ALiBi say, do not.
    """
    place = torch.arange(8, device=device)[None]
    states = [
        trunk(input_ids=tokens, position_ids=place % 4, use_cache=False).last_hidden_state[:, 4:]
        for tokens in (place, torch.where(place < 4, 7 - place, place))
    ]
    return torch.allclose(*states, rtol=1e-3, atol=1e-3 * states[0].abs().max().item())
