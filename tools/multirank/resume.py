"""Optimizer steps: those of one layout beside another's, and those that one saves and another resumes.

Owns the steps; the order of the layouts is `check.py`'s. The optimizer is Megatron's, as a rule the
distributed one, which shards Adam's moments over data-parallel and context-parallel ranks.
"""

import os

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from multirank.layouts import (
    Case,
    Layout,
    build,
    load_weights,
    metadata,
    reduce_reports,
    run_batch,
    save_in_place_of_weights,
    sharded,
)

LEARNING_RATE = 1e-3


def _optimizer(models, case: Case, distributed: bool = True, rate: float = LEARNING_RATE, eps: float = 1e-6):
    settings = OptimizerConfig(
        optimizer="adam",
        lr=rate,
        min_lr=rate,
        weight_decay=0.1,
        adam_eps=eps,
        clip_grad=1.0,
        bf16=models[0].module.config.bf16,
        params_dtype=case.work.dtype,
        use_distributed_optimizer=distributed,
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


def updated(layout: Layout, case: Case, weights: str, folder: str, distributed: bool = True) -> dict:
    """Two updates. Saves to `folder` how far each weight went.

    Adam divides a gradient by its own size plus `eps`: a large one keeps rounding in small gradients small. A
    large learning rate keeps the way that a weight goes above the rounding of the weight.

    Returns:
        Losses before each update, None but on last-stage ranks, and the norm of each whole gradient.
    """
    models = build(layout, case, distributed_optimizer=distributed)
    load_weights(models, weights)
    start = {parameter: parameter.detach().clone() for model in models for parameter in model.parameters()}
    optimizer = _optimizer(models, case, distributed, rate=1.0, eps=0.1)
    optimizer.reload_model_params()
    losses, norms = [], []
    for _ in range(2):
        optimizer.zero_grad()
        losses.append(reduce_reports(run_batch(layout, case, models)))
        norms.append(float(optimizer.step()[1]))
    save_in_place_of_weights(models, folder, lambda weight: weight - start[weight])
    return {"losses": losses, "norms": norms}
