"""Optimizer steps that one layout saves and another resumes: weights and Adam's moments, resharded.

Owns one step of the chain; the order of the layouts is `check.py`'s. The optimizer is the distributed one.
"""

import os

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from multirank.layouts import Case, Layout, build, load_weights, metadata, reduce_reports, run_batch, sharded

LEARNING_RATE = 1e-3


def _optimizer(models, case: Case):
    settings = OptimizerConfig(
        optimizer="adam",
        lr=LEARNING_RATE,
        min_lr=LEARNING_RATE,
        weight_decay=0.1,
        adam_eps=1e-6,
        clip_grad=1.0,
        bf16=models[0].module.config.bf16,
        params_dtype=case.work.dtype,
        use_distributed_optimizer=True,
    )
    return get_megatron_optimizer(settings, models)


def _state(models, optimizer, loading: bool) -> dict:
    state = sharded(models)
    return state | {"optimizer": optimizer.sharded_state_dict(state, is_loading=loading, metadata=metadata())}


def _resume(models, optimizer, folder: str) -> None:
    state = dist_checkpointing.load(_state(models, optimizer, loading=True), folder)
    for i, model in enumerate(models):
        model.module.load_state_dict(state[f"model{i}"])
    optimizer.load_state_dict(state["optimizer"])


def _update(layout: Layout, case: Case, models, optimizer) -> dict | None:
    optimizer.zero_grad()
    losses = reduce_reports(run_batch(layout, case, models))
    optimizer.step()
    return losses


def resumed_step(layout: Layout, case: Case, source: str, target: str) -> dict | None:
    """Load `source`, take one step, save `target`; losses before the step, on last-stage ranks."""
    models = build(layout, case, distributed_optimizer=True)
    optimizer = _optimizer(models, case)
    _resume(models, optimizer, source)
    losses = _update(layout, case, models, optimizer)
    if dist.get_rank() == 0:
        os.makedirs(target, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(_state(models, optimizer, loading=False), target)
    return losses


def uninterrupted(case: Case, weights: str, target: str, count: int) -> list[dict]:
    """Losses of `count` steps of one process; saves its state after the first to `target`."""
    models = build(Layout(), case, distributed_optimizer=True)
    load_weights(models, weights)
    optimizer = _optimizer(models, case)
    optimizer.reload_model_params()
    losses = []
    for done in range(count):
        losses.append(_update(Layout(), case, models, optimizer))
        if done == 0:
            os.makedirs(target, exist_ok=True)
            dist_checkpointing.save(_state(models, optimizer, loading=False), target)
    return losses
