"""What a small run really costs on gloo ranks: parameters, bytes received, activations, FLOPs."""

import torch
import torch.distributed as dist
from layouts import MICRO, NUM_MICRO, SEQ, VOCAB, Case, Layout, batches, build, run_batch
from megatron.core import parallel_state
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from megatron_clsa.estimate.shape import RunShape
from megatron_clsa.model.forward_mode import ForwardMode


def shape_of(layout: Layout, config) -> RunShape:
    return RunShape(
        config, VOCAB, SEQ, MICRO, MICRO * NUM_MICRO, layout.world, dtype_bytes=4, backend="local"
    )


RECEIVED = "point to point"
# Index of the tensors that count, and how many times their other ranks' share arrives.
GATHERED = {"_allgather_base_": (0, 1), "_reduce_scatter_base_": (1, 1), "allreduce_": (0, 2)}


class ReceivedBytes(TorchDispatchMode):
    """Adds up what collectives and receives bring to this rank, by process group."""

    def __init__(self):
        super().__init__()
        self.by_group: dict[str, float] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self._count(function._schema.name.removeprefix("c10d::"), args)
        return function(*args, **(kwargs or {}))

    def _count(self, name: str, args):
        group = next(dist.ProcessGroup.unbox(x) for x in args if isinstance(x, torch.ScriptObject))
        if name == "recv_":
            size = sum(x.nbytes for x in args[0])
        elif name in GATHERED:
            place, times = GATHERED[name]
            tensors = args[place] if isinstance(args[place], list | tuple) else [args[place]]
            size = times * sum(x.nbytes for x in tensors) * (group.size() - 1) / group.size()
        else:
            size = 0
        # Megatron receives over two groups when it overlaps both directions of a pipeline link.
        whole = name == "recv_" and group.size() == dist.get_world_size()
        place = (
            RECEIVED if whole and parallel_state.get_context_parallel_world_size() == 1 else group.group_name
        )
        self.by_group[place] = self.by_group.get(place, 0) + size


def costs_of(layout: Layout, case: Case) -> dict:
    """Of this rank: its parameters and the bytes that it received over each link in one step."""
    models = build(layout, case)
    config = models[0].module.config
    with ReceivedBytes() as received:
        run_batch(layout, case, models)
    places = {
        "TP": [parallel_state.get_tensor_model_parallel_group().group_name],
        "CP": [parallel_state.get_context_parallel_group().group_name],
        "PP": [parallel_state.get_pipeline_model_parallel_group().group_name, RECEIVED],
    }
    return {
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "parameters": sum(p.numel() for model in models for p in model.parameters()),
        "trained": sum(p.numel() for model in models for p in model.parameters() if p.requires_grad),
        "received": {
            link: sum(received.by_group.get(name, 0.0) for name in names) for link, names in places.items()
        },
        "config": config,
    }


def saved_activations(case: Case, config: dict) -> tuple[float, object]:
    """Bytes that autograd keeps between forward and backward of one microbatch, weights left out."""
    model = build(Layout(config=config), case)[0].module
    model.train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    batch = next(iter(batches(case)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        mode = ForwardMode.from_config(model.config, training=True)
        model(batch["tokens"], batch["position_ids"], batch["labels"], batch["loss_mask"], mode)
    return sum(x.untyped_storage().nbytes() for x in kept.values()), model.config


def forward_and_backward_flops(case: Case, config: dict) -> tuple[dict[str, int], object]:
    """FLOPs of `mm` (linears) and `bmm` (attention, scores) of one microbatch, by pass."""
    model = build(Layout(config=config), case)[0].module
    model.train()
    batch = next(iter(batches(case)))
    mode = ForwardMode.from_config(model.config, training=True)
    with FlopCounterMode(display=False) as forward:
        losses = model(batch["tokens"], batch["position_ids"], batch["labels"], batch["loss_mask"], mode)
    with FlopCounterMode(display=False) as backward:
        losses.sum().backward()
    aten = torch.ops.aten
    by_name = {
        f"{name} {kind}": counter.get_flop_counts()["Global"].get(operator, 0)
        for name, counter in (("forward", forward), ("backward", backward))
        for kind, operator in (("mm", aten.mm), ("bmm", aten.bmm))
    }
    return by_name, model.config
