"""What every entry of the dispatcher refuses. What it chooses is in the tests of what it chooses from."""

import pytest
import torch
from kernel_cases import make_case

from megatron_clsa.kernels import dispatch
from megatron_clsa.kernels.rows import causal_rows

ENTRIES = {
    "topk_index": lambda c, i, lse: dispatch.topk_index(c.q_idx, c.k_idx, c.rows, 2),
    "dense_attention": lambda c, i, lse: dispatch.dense_attention(c.query, c.key, c.value, c.rows, 1.0),
    "build_plan": lambda c, i, lse: dispatch.build_plan(i, c.rows, c.key.shape[1], 2),
    "sparse_attention": lambda c, i, lse: dispatch.sparse_attention(c.query, c.key, c.value, i, c.rows, 1.0),
    "window_attention": lambda c, i, lse: dispatch.window_attention(c.query, c.key, c.value, c.rows, 4, 1.0),
    "attention_kd": lambda c, i, lse: dispatch.attention_kd(
        c.query, c.key, lse, c.q_idx, c.k_idx, c.rows, i, 1.0, 1.0
    ),
    "attention_kd_sum": lambda c, i, lse: dispatch.attention_kd_sum(
        c.query, c.key, lse, c.q_idx, c.k_idx, c.rows, i, c.rows.end >= 0, 1.0, 1.0
    ),
}


@pytest.mark.parametrize("b, sq", [(0, 8), (1, 0)])
@pytest.mark.parametrize("entry", ENTRIES)
def test_no_query_is_refused(entry, b, sq):
    case = make_case(b=b, sq=sq, sk=8, rows=causal_rows(b, sq))
    index, lse = torch.zeros(b, sq, 2, dtype=torch.int32), torch.zeros(b, 4, sq)
    with pytest.raises(ValueError, match="at least one query"):
        ENTRIES[entry](case, index, lse)
