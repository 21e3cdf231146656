"""The predicted speed: its term for sparse attention against indices drawn and counted.

Owns no timing; what was measured is in docs/results/parallel.json, held in tests/tools.
"""

import pytest
import torch
from layouts import Case, Layout, make_config
from measured import shape_of

from megatron_clsa.estimate import flops, links, speed

SPARSE = Case("sparse", kd_loss="selected")
DENSE = Case("dense", cross_attention="dense", trainable="backbone")


def _run(case: Case = SPARSE):
    return shape_of(Layout(), make_config(Layout(), case))


def test_rates_of_sparse_attention_are_those_that_choose_its_kernel():
    choice = pytest.importorskip("megatron_clsa.kernels.sparse_choice", exc_type=ImportError)
    assert (speed.UNION_NS, speed.MASKED_NS) == (choice.UNION_NS, choice.MASKED_NS)
    assert speed.TILE_ROWS == choice.UNION_ROWS


def test_union_of_a_random_index_is_what_random_indices_have(monkeypatch):
    """Draws k of v keys for every query of a tile, counts the union, at every query of a short sequence."""
    run, generator = _run(), torch.Generator().manual_seed(1)
    c = run.config
    queries = speed.TILE_ROWS * c.num_query_groups // c.num_attention_heads
    unions = []
    for position in range(run.seq_length):
        scores = torch.rand(200, queries, position + 1, generator=generator)
        chosen = scores.topk(min(c.index_topk, position + 1)).indices.flatten(1)
        unions.append(sum(len(row.unique()) for row in chosen) / len(chosen))
    expected = sum(unions) / queries * c.num_query_groups * c.num_cross_decoder_layers * run.global_batch
    monkeypatch.setattr(speed, "MASKED_NS", 1e9)
    found = speed.sparse_attention_seconds(run) * 1e9 / speed.UNION_NS * 128 / c.kv_channels
    assert found == pytest.approx(expected, rel=0.05)


def test_the_faster_kind_of_tile_is_taken(monkeypatch):
    both = speed.sparse_attention_seconds(_run())
    alone = []
    for slow in ("UNION_NS", "MASKED_NS"):
        with monkeypatch.context() as patch:
            patch.setattr(speed, slow, 1e9)
            alone.append(speed.sparse_attention_seconds(_run()))
    assert both == min(alone) > 0


def test_dense_attention_costs_its_flops_and_nothing_else():
    run, machine = _run(DENSE), speed.Machine()
    assert speed.sparse_attention_seconds(run) == 0
    seconds = flops.total(run) / (machine.peak_tflops * 1e12 * machine.efficiency)
    seconds += sum(links.of_step(run).values()) / machine.inside
    assert speed.predict(run, machine).seconds == pytest.approx(seconds)
