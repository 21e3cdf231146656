"""The memory asks for the plan of the kernel that the configuration names, and says what will read it."""

from types import SimpleNamespace

import pytest
import torch

from megatron_clsa.kernels import dispatch
from megatron_clsa.kernels.rows import causal_rows
from megatron_clsa.model.forward_mode import ForwardMode
from megatron_clsa.model.shared_memory import gather_memory
from megatron_clsa.parallel.pipeline import MemoryShard


@pytest.mark.parametrize("kernel", ["auto", "union", "masked"])
@pytest.mark.parametrize("kd_loss", ["off", "full", "selected"])
def test_the_plan_is_made_for_the_kernel_that_the_flag_names(kernel, kd_loss, monkeypatch):
    asked = []
    monkeypatch.setattr(dispatch, "build_plan", lambda *args: asked.append(args[2:]))
    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    config = SimpleNamespace(
        index_head_dim=4, kv_channels=8, index_topk=3, num_attention_heads=6, num_query_groups=2,
        sparse_attention_kernel=kernel,
    )  # fmt: skip
    shard = MemoryShard(torch.randn(16, 1, 32), torch.randn(16, 1, 8), None)
    groups = SimpleNamespace(tp=alone, cp=alone)
    gather_memory(shard, causal_rows(1, 16), None, ForwardMode("sparse", kd_loss), config, groups)
    assert asked == [(16, 3, kernel, kd_loss == "selected")]
