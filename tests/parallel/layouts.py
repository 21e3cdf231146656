"""One training step of a small CLSA under a parallel layout: losses, every gradient, the selected index."""

import os
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_clsa.config import CLSAConfig
from megatron_clsa.kernels import dispatch
from megatron_clsa.model.builder import CLSAModelBuilder, CLSAModelConfig
from megatron_clsa.model.forward_mode import ForwardMode
from megatron_clsa.parallel.context import gather_rows, gather_sequence

SEQ, VOCAB, MICRO, NUM_MICRO = 32, 64, 2, 4


@dataclass(frozen=True)
class Layout:
    """Parallel sizes; DP is what the world leaves over."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    vpp: int | None = None
    config: dict = field(default_factory=dict)

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.cp * self.dp


@dataclass(frozen=True)
class Case:
    """What the step computes."""

    name: str
    cross_attention: str = "sparse"
    kd_loss: str = "off"
    trainable: str = "all"
    packed: bool = True
    overrides: dict = field(default_factory=dict)


def make_config(layout: Layout, case: Case, dtype=torch.float32) -> CLSAConfig:
    fields = dict(
        num_layers=8,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        sliding_window=5,
        index_topk=6,
        index_head_dim=8,
        index_qk_norm=True,
        cross_qk_norm=True,
        qk_layernorm=True,
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.tp > 1,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        deallocate_pipeline_outputs=True,
        overlap_p2p_comm=bool(layout.vpp),
        batch_p2p_comm=not layout.vpp,
        init_method_std=0.2,
        cross_attention=case.cross_attention,
        kd_loss=case.kd_loss,
        kd_loss_coeff=0.5,
        trainable=case.trainable,
    )
    return CLSAConfig(**(fields | layout.config | case.overrides))


def build(layout: Layout, case: Case):
    """Model chunks of this rank, wrapped in DDP."""
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            layout.tp,
            layout.pp,
            virtual_pipeline_model_parallel_size=layout.vpp,
            context_parallel_size=layout.cp,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(123)
    torch.manual_seed(123)
    settings = CLSAModelConfig(transformer=make_config(layout, case), vocab_size=VOCAB, seq_length=SEQ)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=False)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return CLSAModelBuilder(settings).build_distributed_models(
        groups, ddp_config=ddp, mixed_precision_wrapper=None
    )


def sharded(models) -> dict:
    metadata = {
        "non_homogeneous_layers": True,
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    return {f"model{i}": m.module.sharded_state_dict(metadata=metadata) for i, m in enumerate(models)}


def batches(case: Case):
    """The global batch of every layout, this data-parallel and context-parallel rank's share of it."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, VOCAB, (MICRO * NUM_MICRO, SEQ + 1), generator=generator)
    positions = torch.arange(SEQ).repeat(len(tokens), 1)
    mask = torch.ones(len(tokens), SEQ)
    if case.packed:
        for row in range(len(tokens)):
            for start in torch.randperm(SEQ - 2, generator=generator)[: row % 3] + 1:
                positions[row, start:] = torch.arange(SEQ - start)
                mask[row, start - 1] = 0
        positions = torch.minimum(positions, _restart(positions))
    size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    share = len(tokens) // size
    for i in range(rank * share, (rank + 1) * share, MICRO):
        rows = slice(i, i + MICRO)
        batch = {
            "tokens": tokens[rows, :-1].contiguous(),
            "labels": tokens[rows, 1:].contiguous(),
            "loss_mask": mask[rows].contiguous(),
            "position_ids": positions[rows].contiguous(),
            "attention_mask": None,
        }
        if parallel_state.get_context_parallel_world_size() > 1:
            group = parallel_state.get_context_parallel_group()
            batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)
        yield batch


def _restart(positions):
    """Distance to the last zero: overlapping cuts made above may not be in order."""
    index = torch.arange(positions.size(1)).expand_as(positions)
    start = torch.where(positions == 0, index, 0).cummax(1).values
    return index - start


def _loss(batch, mode, output):
    mask = batch["loss_mask"]
    loss = (output.float() * mask).sum()
    count = mask.sum().int()
    report = {"lm": loss.detach(), "kd": mode.report.kd_loss_sum, "count": count}
    return loss, count, report


def step(layout: Layout, case: Case, weights: str, grads: str) -> dict:
    """One global batch; saves gradients to `grads`, returns losses (on last-stage ranks) and the index."""
    models = build(layout, case)
    state = dist_checkpointing.load(sharded(models), weights)
    for i, model in enumerate(models):
        model.module.load_state_dict(state[f"model{i}"])
        model.zero_grad_buffer()
        model.train()
    config = models[0].module.config
    config.finalize_model_grads_func = finalize_model_grads
    indices, original = [], dispatch.topk_index

    def recorded(*args):
        indices.append(original(*args))
        return indices[-1]

    def forward_step(iterator, model):
        batch = next(iterator)
        mode = ForwardMode.from_config(config, training=True)
        output = model(
            batch["tokens"], batch["position_ids"], batch["labels"], loss_mask=batch["loss_mask"], mode=mode
        )
        return output, partial(_loss, batch, mode)

    dispatch.topk_index = recorded
    try:
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[batches(case) for _ in models] if layout.vpp else batches(case),
            model=models if layout.vpp else models[0],
            num_microbatches=NUM_MICRO // layout.dp,
            seq_length=SEQ,
            micro_batch_size=MICRO,
            forward_only=False,
        )
    finally:
        dispatch.topk_index = original
    _save_gradients(models, grads)
    return {"reports": _reduce(reports), "index": _whole_index(indices), "index_calls": len(indices)}


def _save_gradients(models, folder: str) -> None:
    state = sharded(models)
    for entry in nested_values(state):
        data = getattr(entry, "data", None)
        if hasattr(data, "main_grad"):
            entry.data = data.main_grad.clone()
        elif isinstance(data, torch.nn.Parameter):
            entry.data = torch.zeros_like(data)
    if dist.get_rank() == 0:
        os.makedirs(folder, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(state, folder)


def _reduce(reports) -> dict | None:
    """Mean losses over the whole batch, on last-stage ranks."""
    if not reports:
        return None
    totals = torch.stack([torch.stack([r["lm"], r["kd"], r["count"].float()]) for r in reports]).sum(0)
    dist.all_reduce(totals, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return {"lm": (totals[0] / totals[2]).item(), "kd": (totals[1] / totals[2]).item()}


def _whole_index(indices) -> list:
    """`[b, s, k]` per microbatch: this rank's rows gathered over TP and CP, in token order."""
    tp, cp = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_context_parallel_group()
    rows = [gather_sequence(gather_rows(i.transpose(0, 1).contiguous(), tp), cp) for i in indices]
    return [r.transpose(0, 1).tolist() for r in rows]


def save_weights(folder: str) -> None:
    """Random weights of a single process, in a form that every layout loads."""
    os.makedirs(folder, exist_ok=True)
    dist_checkpointing.save(sharded(build(Layout(), Case("init"))), folder)


def steps(layout: Layout, cases: list[Case], weights: str, folder: str) -> dict:
    """`step` for each case, gradients under `folder/<case>`; one start of the ranks serves them all."""
    return {case.name: step(layout, case, weights, f"{folder}/{case.name}") for case in cases}


def compare_gradients(pairs: list[tuple[str, str]]) -> list[tuple[float, str]]:
    """Of each pair of saved gradients, the largest difference relative to the tensor's largest element."""
    return [_worst(*(dist_checkpointing.load_plain_tensors(folder) for folder in pair)) for pair in pairs]


def _worst(expected: dict, actual: dict) -> tuple[float, str]:
    assert expected.keys() == actual.keys(), expected.keys() ^ actual.keys()
    return max(
        (float((expected[k] - actual[k]).abs().max() / expected[k].abs().max().clamp(min=1e-6)), k)
        for k in expected
        if torch.is_tensor(expected[k])
    )
