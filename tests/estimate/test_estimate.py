"""The formulas of estimate/ against small models: built, run and counted on gloo ranks."""

import pytest
from layouts import Case, Layout, make_config
from measured import costs_of, forward_and_backward_flops, saved_activations, shape_of
from ranks import run_ranks

from megatron_clsa.estimate import flops, links, memory, parameters

SPARSE = Case("sparse", kd_loss="selected")
DENSE = Case("dense", cross_attention="dense", trainable="backbone")
WARMUP = Case("warmup", cross_attention="dense", kd_loss="full", trainable="indexer")
PLAIN = Case("plain", overrides=dict(qk_layernorm=False, cross_qk_norm=False, index_qk_norm=False))
MEASURED = [
    (Layout(), SPARSE),
    (Layout(), PLAIN),
    (Layout(tp=2), SPARSE),
    (Layout(tp=2), DENSE),
    (Layout(tp=2), WARMUP),
    (Layout(cp=2), SPARSE),
    (Layout(cp=2), DENSE),
    (Layout(pp=2), SPARSE),
    (Layout(pp=2, config=dict(num_layers_in_first_pipeline_stage=3)), SPARSE),
    (Layout(pp=2, config=dict(num_layers_in_first_pipeline_stage=5)), DENSE),
    (Layout(pp=2, vpp=2), SPARSE),
    (Layout(tp=2, pp=2), SPARSE),
]


@pytest.mark.parametrize("layout, case", MEASURED, ids=lambda value: str(value)[:60])
def test_parameters_and_bytes_over_links_equal_a_real_step(layout, case):
    """Exact, but for what a formula should not hold: flags, shapes and norms of a few bytes."""
    for cost in run_ranks(layout.world, costs_of, layout, case):
        run = shape_of(layout, cost["config"])
        stage = run.stage(cost["stage"])
        backbone, indexer = parameters.of_stage(run, stage)
        assert cost["parameters"] == (backbone + indexer).on_rank(layout.tp)
        assert cost["trained"] == parameters.trainable(run, stage).on_rank(layout.tp)
        expected = links.of_stage(run, cost["stage"])
        for link, received in cost["received"].items():
            assert received == pytest.approx(expected[link], rel=0.01, abs=512), link


def test_a_pipeline_layout_in_letters_is_counted_without_a_process_group():
    letters = dict(pipeline_model_parallel_layout="Et|t*3|t*2|t*2L")
    run = shape_of(Layout(), make_config(Layout(pp=2, vpp=2, config=letters), SPARSE))
    assert [run.chunk_layers(rank) for rank in (0, 1)] == [[(0, 1), (4, 2)], [(1, 3), (6, 2)]]


WIDE = dict(hidden_size=128, ffn_hidden_size=320, kv_channels=32, num_query_groups=4, index_head_dim=16)
RECOMPUTE = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


@pytest.mark.parametrize(
    "case, config",
    [(DENSE, {}), (SPARSE, {}), (WARMUP, {}), (PLAIN, {}), (SPARSE, RECOMPUTE)],
    ids=["dense", "sparse", "warmup", "without head norms", "recompute"],
)
def test_activations_are_within_a_tenth_of_what_autograd_keeps(case, config, monkeypatch):
    """torch's RMSNorm keeps its input twice on CPU, once on GPUs, which the formula is for."""
    kept, built = run_ranks(1, saved_activations, case, WIDE | config)[0]
    run = shape_of(Layout(), built)
    monkeypatch.setattr(memory, "norm", lambda run: 4 + 4 + run.dtype_bytes)
    monkeypatch.setattr(memory, "head_norm", lambda run, enabled: 8 * enabled)
    expected = sum(memory.activations(run, run.stage(0)).values()) / run.in_flight(0)
    logits = run.rows * run.vocab_size * 4 * (built.trainable != "indexer")
    assert kept == pytest.approx(expected + logits, rel=0.1)


def test_flops_of_matrices_are_what_torch_counts():
    counted, config = run_ranks(1, forward_and_backward_flops, DENSE, {})[0]
    run = shape_of(Layout(), config)
    sequences = run.micro_batch
    once = {name: sequences * value for name, value in flops.forward(run).items()}
    attention = once.pop("cross attention")
    once.pop("window attention")  # counted by no operator that torch's counter knows on CPU
    assert counted["forward mm"] == sum(once.values())
    assert counted["backward mm"] == 2 * counted["forward mm"]
    # The plain-torch kernels compute whole blocks: here all pairs, of which a causal row sees half.
    share = flops.pairs(run.seq_length, run.seq_length) / run.seq_length**2
    assert counted["forward bmm"] * share == attention


@pytest.mark.parametrize("case", [SPARSE, WARMUP], ids=["sparse", "warmup"])
def test_flops_of_training_the_indexer_are_what_torch_counts(case):
    counted, config = run_ranks(1, forward_and_backward_flops, case, {})[0]
    run = shape_of(Layout(), config)
    scores = 2 * config.index_head_dim * flops.pairs(run.seq_length, run.seq_length)
    scores *= config.cross_attention == "sparse"
    step = {name: value / run.global_batch * run.micro_batch for name, value in flops.of_step(run).items()}
    once = {name: value * run.micro_batch for name, value in flops.forward(run).items()}
    backward = sum(step[name] - once[name] for name in once if "attention" not in name and name in step)
    assert counted["backward mm"] == backward
    assert once["index"] >= scores


def test_a_step_of_the_paper_needs_what_its_size_says():
    """6 FLOPs a parameter and token, embedding aside, plus attention: a check against slips of a power."""
    run = shape_of(Layout(), run_ranks(1, costs_of, Layout(), DENSE)[0]["config"])
    matrices = parameters.total(run) - run.vocab_size * run.config.hidden_size
    parts = flops.of_step(run)
    without_attention = sum(value for name, value in parts.items() if "attention" not in name)
    assert without_attention == pytest.approx(6 * matrices * run.tokens, rel=0.05)
