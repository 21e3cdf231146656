"""Steps with one error planted in how ranks work together, for test_check_parallel.py; correct on one rank.

Functions of a module of their own: the ranks are other processes, which import them by name.
"""

import torch
import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule
from multirank import layouts

from megatron_clsa.kernels import dispatch
from megatron_clsa.parallel import context


def lost_halo(*args):
    """Window layers see zeros in the place of their neighbours' rows."""
    context._exchange = lambda to_next, to_previous, group: (
        torch.zeros_like(to_previous),
        torch.zeros_like(to_next),
    )
    return layouts.steps(*args)


def unsummed_norms(*args):
    """Gradients of weights that every TP rank holds, but feeds with its own rows, are not summed."""
    if dist.get_world_size() > 1:
        plain = MegatronModule.named_parameters

        def forget(self, *names, **options):
            for name, parameter in plain(self, *names, **options):
                parameter.sequence_parallel = False
                yield name, parameter

        MegatronModule.named_parameters = forget
    return layouts.steps(*args)


def other_index(*args):
    """The last rank takes each row's index one position further on."""
    plain, last = dispatch.topk_index, dist.get_world_size() > 1 and dist.get_rank() == 1

    def shifted(*tensors):
        index = plain(*tensors)
        return torch.where(index > 0, index - 1, index) if last else index

    dispatch.topk_index = shifted
    return layouts.steps(*args)
