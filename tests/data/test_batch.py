"""get_batch on gloo ranks: who reads, who receives, and which rows a context-parallel rank keeps."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core import parallel_state

from megatron_clsa.data import provider
from tests.parallel.ranks import run_ranks

SEQ, MICRO = 16, 2


def _samples():
    """One microbatch; every key's values differ, so that none can be taken for another."""
    rows = torch.arange(MICRO * SEQ).view(MICRO, SEQ)
    yield {
        "tokens": rows,
        "labels": rows + 1000,
        "loss_mask": (rows % 3 != 0).float(),
        "position_ids": rows % 5,
    }


def _batch_of_rank(tp: int, pp: int, cp: int) -> dict:
    parallel_state.initialize_model_parallel(tp, pp, context_parallel_size=cp)
    args = SimpleNamespace(
        context_parallel_size=cp, micro_batch_size=MICRO, seq_length=SEQ, pipeline_model_parallel_size=pp
    )
    provider.get_args = lambda: args
    reads = parallel_state.get_tensor_model_parallel_rank() == 0
    batch = provider.get_batch(_samples() if reads else None)
    torch.distributed.barrier()  # a rank that leaves early would break groups that others still connect
    stage = parallel_state.get_pipeline_model_parallel_rank()
    values = {key: None if value is None else value.tolist() for key, value in batch.items()}
    return {"stage": stage, "cp": parallel_state.get_context_parallel_rank(), "batch": values}


def _rows(cp: int, rank: int) -> list[int]:
    """Zigzag: chunk r and chunk 2*cp - 1 - r of 2*cp."""
    chunks = torch.arange(SEQ).chunk(2 * cp)
    return torch.cat([chunks[rank], chunks[2 * cp - 1 - rank]]).tolist()


@pytest.mark.parametrize("tp, pp, cp", [(2, 1, 1), (1, 1, 2), (1, 3, 1), (2, 2, 1), (2, 1, 2)])
def test_every_rank_gets_its_part_of_one_microbatch(tp, pp, cp):
    whole = next(_samples())
    for result in run_ranks(tp * pp * cp, _batch_of_rank, tp, pp, cp):
        rows = _rows(cp, result["cp"]) if cp > 1 else list(range(SEQ))
        first, last = result["stage"] == 0, result["stage"] == pp - 1
        needed = {"tokens": first, "position_ids": first, "labels": last, "loss_mask": first or last}
        for key, wanted in needed.items():
            assert result["batch"][key] == (whole[key][:, rows].tolist() if wanted else None), (key, result)
