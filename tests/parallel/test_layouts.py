"""Every parallel layout computes what one process computes: losses, each gradient, the selected index.

And, with the distributed optimizer, the same updated weights as one process without it.

Tolerances: sums over ranks are taken in another order than in one process; in fp32 that moves a gradient by a
few units in the last place of its largest element (2e-6 of it observed at most), and losses by 1e-6. The
second update starts from weights that differ by as much, and its gradient with them (1e-5 observed).
"""

import pytest
from layouts import Case, Layout, compare_gradients, save_weights, steps, updated
from ranks import run_ranks

CASES = [
    Case("dense", cross_attention="dense", trainable="backbone"),
    Case("sparse"),
    Case("sparse_selected", kd_loss="selected"),
    Case("sparse_full_unpacked", kd_loss="full", packed=False),
    Case("warmup", cross_attention="dense", kd_loss="full", trainable="indexer"),
]
# Trained parameters on every stage, and on the memory's alone: elsewhere the optimizer has nothing to do.
UPDATED = [case for case in CASES if case.name in ("sparse_selected", "warmup")]
FULL_RECOMPUTE = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
BLOCK_RECOMPUTE = FULL_RECOMPUTE | dict(recompute_method="block", recompute_num_layers=2)
CORE_RECOMPUTE = dict(recompute_granularity="selective", recompute_modules=["core_attn"])


def _first_stage(layers: int) -> dict:
    return dict(num_layers_in_first_pipeline_stage=layers)


LAYOUTS = {
    "tp2": Layout(tp=2),
    "cp2": Layout(cp=2),
    "cp2_window_over_chunks": Layout(cp=2, config=dict(sliding_window=12)),
    "pp2_cut_at_memory": Layout(pp=2),
    "pp2_cut_in_self_decoder": Layout(pp=2, config=_first_stage(3)),
    "pp2_cut_in_cross_decoder": Layout(pp=2, config=_first_stage(5)),
    "dp2": Layout(dp=2),
    "pp2_vpp2": Layout(pp=2, vpp=2),
    "tp2_pp2": Layout(tp=2, pp=2),
    "tp2_cp2": Layout(tp=2, cp=2, config=FULL_RECOMPUTE),
    "pp2_cp2": Layout(pp=2, cp=2, config=CORE_RECOMPUTE),
    "cp4": Layout(cp=4, config=dict(sliding_window=3)),
    "recompute_full": Layout(config=FULL_RECOMPUTE),
    "recompute_block_pp2": Layout(pp=2, config=BLOCK_RECOMPUTE | _first_stage(3)),
}


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("weights"))
    run_ranks(1, save_weights, folder)
    return folder


@pytest.fixture(scope="session")
def single(weights, tmp_path_factory):
    """Results and gradients folder of one process, made once a window size."""
    cache = {}

    def result(layout: Layout) -> tuple[dict, str]:
        window = layout.config.get("sliding_window")
        if window not in cache:
            folder = str(tmp_path_factory.mktemp("single"))
            alone = Layout(config={"sliding_window": window} if window else {})
            cache[window] = run_ranks(1, _run, alone, weights, folder, False)[0], folder
        return cache[window]

    return result


def _run(layout: Layout, weights: str, folder: str, distributed: bool) -> dict:
    """On one rank: a step of each case and, under "updates", what the optimizer does with some of them."""
    found = steps(layout, CASES, weights, folder)
    return found | {
        "updates": {
            case.name: updated(layout, case, weights, f"{folder}/{case.name}_updates", distributed)
            for case in UPDATED
        }
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_single_process(name, weights, single, tmp_path):
    layout = LAYOUTS[name]
    expected, expected_folder = single(layout)
    ranks = run_ranks(layout.world, _run, layout, weights, str(tmp_path), True)
    for case in CASES:
        results = [rank[case.name] for rank in ranks]
        for result in results:
            if result["reports"]:
                wanted = expected[case.name]["reports"]
                assert result["reports"] == pytest.approx(wanted, rel=1e-6, abs=1e-6), case.name
        _check_index(layout, case, expected[case.name], results)
    for case in UPDATED:
        _check_updates(expected["updates"][case.name], [rank["updates"][case.name] for rank in ranks])
    limits = {case.name: 1e-5 for case in CASES} | {f"{case.name}_updates": 3e-5 for case in UPDATED}
    pairs = [(f"{expected_folder}/{folder}", f"{tmp_path}/{folder}") for folder in limits]
    errors = run_ranks(1, compare_gradients, pairs)[0]
    for (folder, limit), (worst, parameter) in zip(limits.items(), errors, strict=True):
        assert worst < limit, f"{folder}: {parameter} off by {worst:.1e} of its largest element"


def _check_updates(expected: dict, ranks: list[dict]) -> None:
    """Losses before each update, and the norm by which gradients are clipped, on every rank."""
    for found in ranks:
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        for losses, wanted in zip(found["losses"], expected["losses"], strict=True):
            assert losses is None or losses == pytest.approx(wanted, rel=1e-6, abs=1e-6)


def _check_index(layout: Layout, case: Case, expected: dict, ranks: list[dict]) -> None:
    """One index a microbatch and sequence shard, where it is made, equal to the single process's."""
    made = [rank for rank in ranks if rank["index_calls"]]
    if case.cross_attention == "dense":
        assert not made
        return
    for rank in made:
        assert rank["index_calls"] == 4 // layout.dp, case.name
    assert len(made) == layout.tp * layout.cp * layout.dp
    if layout.dp > 1:  # each replica indexes its own microbatches, in rank order
        made = [{"index": [index for rank in made for index in rank["index"]]}]
    assert all(rank["index"] == expected["index"] for rank in made), case.name
