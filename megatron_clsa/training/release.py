"""Frees one phase's model and optimizer before the next phase builds its own.

Owns the cycles that Python's collector cannot see, because they pass through autograd's C++ nodes: a
parameter's gradient accumulator has a hook of megatron-core's DistributedDataParallel, which keeps the
module; that module keeps the accumulators, its configuration the optimizer, and the optimizer fp32 shards
that are views of the parameters. Megatron trains once a process and never breaks them; here a phase would
start with the models and moments of all before it on the GPU.
"""

import gc

import torch
from megatron.core.distributed import DistributedDataParallel

_built: list[DistributedDataParallel] = []


def remember_chunks(original, *args, **named):
    """`setup_model_and_optimizer`, with its model chunks kept for `free_last_phase`."""
    model, optimizer, scheduler = original(*args, **named)
    _built.extend(chunk for chunk in model if isinstance(chunk, DistributedDataParallel))
    return model, optimizer, scheduler


def free_last_phase():
    """Give the memory of the phase before back to the device; the peak counts from here on.

    To be called when no frame of that phase is left: its configuration holds methods of the optimizer.
    """
    for chunk in _built:
        chunk.grad_accs.clear()
        chunk.config.grad_scale_func = None
        for parameter in chunk.parameters():
            vars(parameter).clear()
    _built.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
