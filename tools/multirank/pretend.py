"""Counts a full-size step's traffic in one process: fake tensors, a fake process group, no GPU.

Owns how a rank is pretended. The model, the schedule and the collectives are the real ones; the kernels are
replaced by functions of the same shapes, since what they compute crosses no link.
"""

from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # gives collectives a fake implementation
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import finalize_model_grads, param_and_grad_buffer
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_clsa.estimate.shape import RunShape
from megatron_clsa.kernels import dispatch
from multirank.layouts import Case, Layout, build, run_batch
from multirank.traffic import Received, Traffic


def _attended(query, key, value):
    """Depends on all three, as attention's output does."""
    out = query + (key.sum() + value.sum())
    return out, query.float().sum(-1).transpose(1, 2).detach()


def _index(q_idx, k_idx, rows, k):
    return q_idx.new_zeros(*q_idx.shape[:2], k, dtype=torch.int32)


def _distilled(query, key, lse, q_idx, k_idx, *rest, **named):
    return (q_idx.sum() + k_idx.sum()).float()


SHAPES_ONLY = {
    "topk_index": _index,
    "build_plan": lambda *args, **named: None,
    "dense_attention": lambda query, key, value, *rest, **named: _attended(query, key, value),
    "sparse_attention": lambda query, key, value, *rest, **named: _attended(query, key, value),
    "window_attention": lambda query, key, value, *rest, **named: query + (key.sum() + value.sum()),
    "attention_kd_sum": _distilled,
}


class Stages:
    """Shapes of what pipeline stages sent, kept from one pretended stage to the next."""

    def __init__(self):
        self.sent: dict[int, torch.Size] = {}

    def communicate_shapes(self, communicator, send_next, send_prev, recv_prev, recv_next):
        """In the place of P2PCommunicator's: nobody is there to tell what comes."""
        stage = parallel_state.get_pipeline_model_parallel_rank()
        if send_next is not None:
            self.sent[stage] = send_next.shape
        return self.sent[stage - 1] if recv_prev else None, self.sent[stage] if recv_next else None

    def patch(self):
        return mock.patch.object(
            P2PCommunicator, "_communicate_shapes", lambda *args: self.communicate_shapes(*args)
        )


@contextmanager
def pretended_rank(layout: Layout, rank: int):
    """This process as rank `rank` of the layout's world; nothing is sent."""
    dist.init_process_group("fake", rank=rank, world_size=layout.world, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(
            layout.tp, layout.pp, context_parallel_size=layout.cp, create_gloo_process_groups=False
        )
        tensor_parallel.model_parallel_cuda_manual_seed(123)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextmanager
def _one_by_one(*args, **named):
    yield mock.Mock()


def _one_step(layout: Layout, case: Case) -> tuple[Received, object]:
    models = build(layout, case, distributed_optimizer=True)
    config = models[0].module.config
    # The token count, whose value divides the gradients, is not known here; it is 4 bytes.
    config.finalize_model_grads_func = lambda chunks, *rest, **named: finalize_model_grads(chunks, None)
    with Traffic() as traffic:
        run_batch(layout, case, models)
        for model in models:
            model.start_param_sync(force_sync=True)
    return traffic.by_link(), config


def count(layout: Layout, case: Case) -> list[tuple[Received, object]]:
    """What a rank of every pipeline stage receives in one step, and its config.

    Context-parallel rank 1, since rank 0 has no neighbour before it: TP varies fastest over ranks, then CP.
    """
    assert layout.vpp is None, "interleaved stages exchange shapes in an order that is not pretended"
    stages, found, inside = Stages(), [], layout.tp if layout.cp > 1 else 0
    for stage in range(layout.pp):
        with ExitStack() as active:
            active.enter_context(pretended_rank(layout, stage * layout.world // layout.pp + inside))
            active.enter_context(stages.patch())
            for name, function in SHAPES_ONLY.items():
                active.enter_context(mock.patch.object(dispatch, name, function))
            # Weights are made in the right dtype; fake ones cannot be converted in place.
            active.enter_context(mock.patch.object(torch.nn.Module, "bfloat16", lambda module: module))
            # The tracker compares random states by value, which fake ones lack; nothing is random here.
            fork = mock.patch.object(CudaRNGStatesTracker, "fork", lambda *args: nullcontext())
            active.enter_context(fork)
            # Several calls sent as one have no fake implementation; one by one they carry the same bytes.
            single = mock.patch.object(param_and_grad_buffer, "_coalescing_manager", _one_by_one)
            active.enter_context(single)
            active.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            found.append(_one_step(layout, case))
    return found


def run_shape(layout: Layout, case: Case, config) -> RunShape:
    """The estimator's view of the same step."""
    work, size = case.work, case.work.dtype.itemsize
    batch = work.micro * work.num_micro
    return RunShape(
        config, work.vocab, work.seq, work.micro, batch, layout.world, dtype_bytes=size, backend="local"
    )
