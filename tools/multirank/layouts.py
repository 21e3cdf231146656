"""One training step of a small CLSA under a parallel layout: losses, every gradient, the selected index.

Owns the step and what is kept of it; not who starts the ranks (`ranks.py`) nor what is compared (`check.py`).
"""

import hashlib
import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
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
class Workload:
    """A global batch: `num_micro` microbatches of `micro` sequences of `seq` tokens, over all replicas.

    `impl`: what the layers are made of, "local" or "transformer_engine".
    """

    seq: int = SEQ
    vocab: int = VOCAB
    micro: int = MICRO
    num_micro: int = NUM_MICRO
    dtype: torch.dtype = torch.float32
    impl: str = "local"


@dataclass(frozen=True)
class Case:
    """What the step computes."""

    name: str
    cross_attention: str = "sparse"
    kd_loss: str = "off"
    trainable: str = "all"
    packed: bool = True
    overrides: dict = field(default_factory=dict)
    work: Workload = Workload()


def make_config(layout: Layout, case: Case, dtype: torch.dtype | None = None) -> CLSAConfig:
    dtype = dtype or case.work.dtype
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
        use_cpu_initialization=not torch.cuda.is_available(),
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.tp > 1,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
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


def build(layout: Layout, case: Case, distributed_optimizer: bool = False, overlap: bool = False):
    """Model chunks of this rank, wrapped in DDP; `overlap`: of its exchange with compute."""
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            layout.tp,
            layout.pp,
            virtual_pipeline_model_parallel_size=layout.vpp,
            context_parallel_size=layout.cp,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(123)
    torch.manual_seed(123)
    config = make_config(layout, case)
    settings = CLSAModelConfig(
        transformer=config,
        vocab_size=case.work.vocab,
        seq_length=case.work.seq,
        transformer_impl=case.work.impl,
    )
    ddp = ddp_config(distributed_optimizer, overlap)
    models = CLSAModelBuilder(settings).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(),
        ddp_config=ddp,
        mixed_precision_wrapper=Float16Module if config.bf16 else None,
    )
    config.finalize_model_grads_func = finalize_model_grads
    if overlap:
        hold_sync(config, models)
    return models


def ddp_config(distributed_optimizer: bool, overlap: bool) -> DistributedDataParallelConfig:
    """`overlap`: as the flags --overlap-grad-reduce and --overlap-param-gather."""
    return DistributedDataParallelConfig(
        use_distributed_optimizer=distributed_optimizer,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
    )


def hold_sync(config, models) -> None:
    """Let the schedule reduce gradients in the last microbatch alone, as Megatron's training loop does."""
    config.no_sync_func = [model.no_sync for model in models] if len(models) > 1 else models[0].no_sync


def metadata() -> dict:
    """How state dicts are sharded: loadable under any other layout."""
    return {
        "non_homogeneous_layers": True,
        "singleton_local_shards": False,
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def sharded(models) -> dict:
    return {f"model{i}": m.module.sharded_state_dict(metadata=metadata()) for i, m in enumerate(models)}


def batches(case: Case):
    """The global batch of every layout, this data-parallel and context-parallel rank's share of it."""
    work, device = case.work, torch.cuda.current_device()
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, work.vocab, (work.micro * work.num_micro, work.seq + 1), generator=generator)
    positions = torch.arange(work.seq).repeat(len(tokens), 1)
    mask = torch.ones(len(tokens), work.seq)
    if case.packed:
        for row in range(len(tokens)):
            for start in torch.randperm(work.seq - 2, generator=generator)[: row % 3] + 1:
                positions[row, start:] = torch.arange(work.seq - start)
                mask[row, start - 1] = 0
        positions = torch.minimum(positions, _restart(positions))
    size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    share = len(tokens) // size
    for i in range(rank * share, (rank + 1) * share, work.micro):
        rows = slice(i, i + work.micro)
        batch = {
            "tokens": tokens[rows, :-1].contiguous().to(device),
            "labels": tokens[rows, 1:].contiguous().to(device),
            "loss_mask": mask[rows].contiguous().to(device),
            "position_ids": positions[rows].contiguous().to(device),
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


def _clsa_step(iterator, model):
    """Megatron's `forward_step_func`: one microbatch through one stage, and the loss of its output."""
    batch = next(iterator)
    mode = ForwardMode.from_config(model.module.config, training=True)
    output = model(
        batch["tokens"], batch["position_ids"], batch["labels"], loss_mask=batch["loss_mask"], mode=mode
    )
    return output, partial(_loss, batch, mode)


def run_batch(layout: Layout, case: Case, models, forward_step=_clsa_step) -> list[dict]:
    """Forward and backward of one global batch; what the last stage reports of each microbatch."""
    for model in models:
        model.zero_grad_buffer()
        model.train()
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[batches(case) for _ in models] if layout.vpp else batches(case),
        model=models if layout.vpp else models[0],
        num_microbatches=case.work.num_micro // layout.dp,
        seq_length=case.work.seq,
        micro_batch_size=case.work.micro,
        forward_only=False,
    )


@contextmanager
def recorded_index(given: list | None = None):
    """Yields (indices that this rank made, indices that its cross layers read).

    `given`: for each microbatch of this rank the `[b, s, k]` index that it hands on in the place of its own.
    """
    made, used = [], []
    topk_index, build_plan = dispatch.topk_index, dispatch.build_plan

    def recorded(q_idx, k_idx, rows, k):
        made.append(topk_index(q_idx, k_idx, rows, k))
        if given is None:
            return made[-1]
        whole = given[len(made) - 1].to(rows.end.device)
        return whole.gather(1, rows.end.long().unsqueeze(-1).expand(-1, -1, k))

    def planned(index, *args):
        used.append(index.transpose(0, 1).contiguous())
        return build_plan(index, *args)

    dispatch.topk_index, dispatch.build_plan = recorded, planned
    try:
        yield made, used
    finally:
        dispatch.topk_index, dispatch.build_plan = topk_index, build_plan


def given_index(file: str | None) -> list | None:
    """The data-parallel rank's share of the indices of all microbatches that `file` holds."""
    if file is None or not os.path.exists(file):
        return None
    whole = torch.load(file, weights_only=True)
    share = len(whole) // parallel_state.get_data_parallel_world_size()
    first = share * parallel_state.get_data_parallel_rank()
    return whole[first : first + share]


def agreement(made: list, given: list | None) -> float | None:
    """Share of the selected positions that both select, the lowest of any microbatch."""
    if not given or not made:
        return None
    return min(_common(*pair) for pair in zip(made, given, strict=True))


def _common(index, other) -> float:
    other = other.to(index.device).sort(-1).values
    place = torch.searchsorted(other, index.contiguous()).clamp(max=other.size(-1) - 1)
    same = (other.gather(-1, place) == index) & (index >= 0)
    return float(same.sum() / (index >= 0).sum())


def load_weights(models, weights: str) -> None:
    state = dist_checkpointing.load(sharded(models), weights)
    for i, model in enumerate(models):
        model.module.load_state_dict(state[f"model{i}"])


def step(layout: Layout, case: Case, weights: str, grads: str, index_file: str | None = None) -> dict:
    """One global batch; saves gradients to `grads`, returns losses (on last-stage ranks) and the index.

    `index` lists the indices that this rank helped to make, `index_used` holds one digest for each whole
    `[b, s, k]` index that its cross layers read. With `index_file` attention reads that selection instead of
    the one just made, and `agreement` tells how much of it both select.
    """
    models = build(layout, case)
    load_weights(models, weights)
    given = given_index(index_file)
    with recorded_index(given) as (made, used):
        reports = run_batch(layout, case, models)
    save_gradients(models, grads)
    tp, cp = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_context_parallel_group()
    whole = [gather_sequence(gather_rows(index.transpose(0, 1).contiguous(), tp), cp) for index in made]
    return {
        "reports": reduce_reports(reports),
        "index": [index.transpose(0, 1).tolist() for index in whole],
        "agreement": agreement([index.transpose(0, 1) for index in whole], given),
        "index_calls": len(made),
        "index_used": sorted({digest(gather_sequence(index, cp).transpose(0, 1)) for index in used}),
    }


def digest(index) -> str:
    """Of one `[b, s, k]` index."""
    return hashlib.sha256(index.contiguous().cpu().numpy().tobytes()).hexdigest()[:16]


def save_gradients(models, folder: str) -> None:
    """Every parameter's, under its name in a checkpoint."""
    save_in_place_of_weights(models, folder, _gradient)


def _gradient(weight: torch.nn.Parameter) -> torch.Tensor:
    return weight.main_grad.clone() if hasattr(weight, "main_grad") else torch.zeros_like(weight)


def save_in_place_of_weights(models, folder: str, value: Callable) -> None:
    """`value(parameter)` of every parameter, under its name in a checkpoint."""
    state = sharded(models)
    for entry in nested_values(state):
        if isinstance(getattr(entry, "data", None), torch.nn.Parameter):
            entry.data = value(entry.data).detach()
    if dist.get_rank() == 0:
        os.makedirs(folder, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(state, folder)


def reduce_reports(reports) -> dict | None:
    """Mean losses over the whole batch, on last-stage ranks."""
    if not reports:
        return None
    totals = torch.stack([torch.stack([r["lm"], r["kd"], r["count"].float()]) for r in reports]).sum(0)
    dist.all_reduce(totals, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return {"lm": (totals[0] / totals[2]).item(), "kd": (totals[1] / totals[2]).item()}


def save_weights(folder: str, case: Case | None = None) -> None:
    """Random weights of a single process, in a form that every layout loads."""
    os.makedirs(folder, exist_ok=True)
    dist_checkpointing.save(sharded(build(Layout(), case or Case("init"))), folder)


def steps(layout: Layout, cases: list[Case], weights: str, folder: str, given: str | None = None) -> dict:
    """`step` for each case, gradients under `folder/<case>`; one start of the ranks serves them all.

    `given`: folder of a `<case>.pt` for each case whose selection is not its own.
    """
    files = {case.name: f"{given}/{case.name}.pt" if given else None for case in cases}
    return {
        case.name: step(layout, case, weights, f"{folder}/{case.name}", files[case.name]) for case in cases
    }


def compare_gradients(pairs: list[tuple[str, str]]) -> list[tuple[float, str]]:
    """Of each pair of saved gradients, the largest difference relative to the tensor's largest element."""
    return [max((error, key) for key, error in gradient_errors(*pair).items()) for pair in pairs]


def gradient_errors(expected_folder: str, actual_folder: str) -> dict[str, float]:
    """Of every parameter, the largest difference relative to the expected tensor's largest element."""
    return _differences(expected_folder, actual_folder, lambda x: x.abs().max())


def gradient_distances(expected_folder: str, actual_folder: str) -> dict[str, float]:
    """Of every parameter, the difference's Euclidean norm relative to the expected tensor's."""
    return _differences(expected_folder, actual_folder, lambda x: x.double().norm())


def _differences(expected_folder: str, actual_folder: str, size) -> dict[str, float]:
    expected, actual = map(dist_checkpointing.load_plain_tensors, (expected_folder, actual_folder))
    assert expected.keys() == actual.keys(), expected.keys() ^ actual.keys()
    return {
        key: float(size(tensor - actual[key].to(tensor.device)) / size(tensor).clamp(min=1e-6))
        for key, tensor in expected.items()
        if torch.is_tensor(tensor)
    }
