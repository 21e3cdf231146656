"""torch.compile takes every operator into one graph, forward and backward, with the same results.

Owns that claim for the operators of `kernels/`; opcheck of each is in its own file.
"""

import pytest
import torch
from kernel_cases import make_case, random_index
from torch.nn.functional import scaled_dot_product_attention

from megatron_clsa.kernels import cudnn, flash, indexer_kd
from megatron_clsa.kernels.indexer_topk import triton_topk
from megatron_clsa.kernels.kd_launch import Tiles
from megatron_clsa.kernels.mask_plan import build_mask_plan
from megatron_clsa.kernels.masked_attention import masked_attention
from megatron_clsa.kernels.plan import build_union_plan
from megatron_clsa.kernels.union_attention import union_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def fresh_graphs(monkeypatch):
    torch._dynamo.reset()
    if DEVICE == "cpu":
        tiles = Tiles(rows=32, keys=16, span=32, gradient_span=64, band=2, stages=1)
        monkeypatch.setattr(indexer_kd, "default_tiles", lambda *tensors: tiles)


def _in_one_graph(function, *tensors):
    """`function` as it is and compiled: outputs, and gradients of their sum to the tensors that want them."""
    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        inputs = [x.detach().requires_grad_(x.requires_grad) for x in tensors]
        out = call(*inputs)
        wanted = [x for x in inputs if x.requires_grad]
        results.append((out, *(torch.autograd.grad(out.sum(), wanted) if wanted else ())))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_the_index_compiles():
    case = make_case(sq=40, d_idx=16, device=DEVICE)
    _in_one_graph(lambda q, k: triton_topk(q, k, case.rows, 7), case.q_idx.bfloat16(), case.k_idx.bfloat16())


@pytest.mark.parametrize("mode", ["full", "selected", "union"])
@pytest.mark.parametrize("kind", ["rows", "sum"])
def test_the_distillation_compiles(kind, mode):
    case = make_case(sq=40, d=16, d_idx=16, device=DEVICE).to(torch.float32)
    index = None if mode == "full" else random_index(case.rows, 40, 6)
    plan = build_union_plan(index, case.rows, 40, 8) if mode == "union" else None
    query, key, lse = case.query.detach(), case.key.detach(), torch.full((1, 4, 40), 3.0, device=DEVICE)
    weight = torch.ones(1, 40, device=DEVICE)

    def distil(q_idx, k_idx):
        arguments = query, key, lse, q_idx, k_idx, case.rows, index
        if kind == "sum":
            return indexer_kd.triton_kd_sum(*arguments, weight, case.scale, case.index_scale, plan)
        return indexer_kd.triton_kd(*arguments, case.scale, case.index_scale, plan)

    _in_one_graph(distil, case.q_idx, case.k_idx)


@pytest.mark.parametrize(
    "build, attend", [(build_union_plan, union_attention), (build_mask_plan, masked_attention)]
)
def test_sparse_attention_compiles(build, attend):
    case = make_case(sq=40, d=16, device=DEVICE).to(torch.float32)
    plan = build(random_index(case.rows, 40, 6), case.rows, 40, 8)
    _in_one_graph(lambda q, k, v: attend(q, k, v, plan, case.scale)[0], case.query, case.key, case.value)


def test_the_choice_of_dense_attention_compiles():
    """Segments are found once, before the graph: within it they are numbers and tensors."""
    case = make_case(sq=40, d=16, device=DEVICE).to(torch.float32)
    flash.segments(case.rows, 40)

    def attend(query):
        if cudnn.plain_causal(case.rows, 40, 40):
            heads_first = query.transpose(1, 2)
            return scaled_dot_product_attention(heads_first, heads_first, heads_first, is_causal=True)
        return query

    _in_one_graph(attend, case.query)


@pytest.mark.gpu
@pytest.mark.parametrize("attend", [cudnn.cudnn_attention, None], ids=["cudnn", "flash"])
def test_dense_attention_compiles(attend):
    case = make_case(sq=128, d=64, device=DEVICE).to(torch.bfloat16)
    flash.segments(case.rows, 128)

    def run(query, key, value):
        if attend:
            return attend(query, key, value, case.scale)[0]
        return flash.flash_attention(query, key, value, case.rows, case.scale)[0]

    _in_one_graph(run, case.query, case.key, case.value)
