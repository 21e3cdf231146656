"""The choice between union and masked tiles: sizes by sample, what the model prefers, and forcing it."""

import pytest
import torch
from kernel_cases import packed_rows, random_index

from megatron_clsa.kernels import sparse_choice
from megatron_clsa.kernels.mask_plan import MaskPlan
from megatron_clsa.kernels.plan import UnionPlan
from megatron_clsa.kernels.rows import causal_rows
from megatron_clsa.kernels.sparse_choice import choose, make_plan, sampled_sizes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _one_set(length: int, k: int) -> torch.Tensor:
    """Every query has the same keys, one in each k-th of the sequence: unions of k and no empty block."""
    keys = torch.arange(0, length, length // k, device=DEVICE, dtype=torch.int32)
    index = keys.expand(1, length, -1)
    return torch.where(index <= torch.arange(length, device=DEVICE)[:, None], index, -1)


def test_sizes_of_all_tiles_are_those_of_the_plans():
    rows = packed_rows(2, 128, [70, 9], DEVICE)
    index = random_index(rows, 128, 12)
    sizes = sampled_sizes(index, rows, 128, 4)
    masked = make_plan(index, rows, 128, 4, "masked")
    assert sizes.live_blocks == masked.live_blocks
    union = make_plan(index, rows, 128, 4, "union")
    # A masked tile begins with one of its two union tiles; padding hides the other's difference here.
    assert sizes.union_rows == pytest.approx(union.union_rows, rel=0.3)


def test_a_sample_of_the_tiles_is_close(monkeypatch):
    rows = causal_rows(1, 512, DEVICE)
    index = random_index(rows, 512, 24)
    exact = sampled_sizes(index, rows, 512, 8)
    monkeypatch.setattr(sparse_choice, "_SAMPLED_TILES", 8)
    sample = sampled_sizes(index, rows, 512, 8)
    assert sample.union_rows == pytest.approx(exact.union_rows, rel=0.1)
    assert sample.live_blocks == pytest.approx(exact.live_blocks, rel=0.1)


def test_shared_keys_take_union_tiles_and_scattered_ones_masked_tiles():
    rows = causal_rows(1, 512, DEVICE)
    assert choose(_one_set(512, 8), rows, 512, 8) == "union"
    assert choose(random_index(rows, 512, 64), rows, 512, 8) == "masked"


def test_distillation_counts_in_the_choice(monkeypatch):
    """Masked tiles pass over most keys of some indices, but their distillation has to look at all."""
    rows = causal_rows(1, 512, DEVICE)
    index = random_index(rows, 512, 8)
    assert sampled_sizes(index, rows, 512, 8).visible_pairs == 512 * 513 / 2
    sizes = sparse_choice.PlanSizes(union_rows=1000.0, live_blocks=5.0, live_pairs=0.0, visible_pairs=2e6)
    assert sizes.masked_cost(False) < sizes.union_cost(False)
    assert sizes.masked_cost(True) > sizes.union_cost(True)
    monkeypatch.setattr(sparse_choice, "sampled_sizes", lambda *_: sizes)
    assert isinstance(make_plan(index, rows, 512, 8), MaskPlan)
    assert isinstance(make_plan(index, rows, 512, 8, distilled=True), UnionPlan)


def test_masks_beyond_the_bound_are_not_made(monkeypatch):
    rows = causal_rows(1, 64, DEVICE)
    index = random_index(rows, 64, 16)
    monkeypatch.setattr(sparse_choice, "MOST_MASK_BYTES", 0)
    assert choose(index, rows, 64, 4) == "union"


def test_a_kernel_that_does_not_exist_is_refused():
    rows = causal_rows(1, 8, DEVICE)
    with pytest.raises(ValueError, match="'maskd'"):
        make_plan(random_index(rows, 8, 2), rows, 8, 4, "maskd")


def test_a_kernel_can_be_forced(monkeypatch):
    rows = causal_rows(1, 64, DEVICE)
    index = random_index(rows, 64, 16)
    assert isinstance(make_plan(index, rows, 64, 4, "masked"), MaskPlan)
    assert isinstance(make_plan(index, rows, 64, 4, "union"), UnionPlan)
    for name in ("union", "masked"):
        monkeypatch.setattr(sparse_choice, "choose", lambda *_, name=name: name)
        assert isinstance(make_plan(index, rows, 64, 4), MaskPlan if name == "masked" else UnionPlan)
