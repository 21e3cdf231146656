"""Every parallel layout computes what one process computes: losses, each gradient, the selected index.

Tolerances: sums over ranks are taken in another order than in one process; in fp32 that moves a gradient by a
few units in the last place of its largest element (2e-6 of it observed at most), and losses by 1e-6.
"""

import pytest
from layouts import Case, Layout, compare_gradients, save_weights, steps
from ranks import run_ranks

CASES = [
    Case("dense", cross_attention="dense", trainable="backbone"),
    Case("sparse"),
    Case("sparse_selected", kd_loss="selected"),
    Case("sparse_full_unpacked", kd_loss="full", packed=False),
    Case("warmup", cross_attention="dense", kd_loss="full", trainable="indexer"),
]
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
            cache[window] = run_ranks(1, steps, alone, CASES, weights, folder)[0], folder
        return cache[window]

    return result


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_single_process(name, weights, single, tmp_path):
    layout = LAYOUTS[name]
    expected, expected_folder = single(layout)
    ranks = run_ranks(layout.world, steps, layout, CASES, weights, str(tmp_path))
    for case in CASES:
        results = [rank[case.name] for rank in ranks]
        for result in results:
            if result["reports"]:
                wanted = expected[case.name]["reports"]
                assert result["reports"] == pytest.approx(wanted, rel=1e-6, abs=1e-6), case.name
        _check_index(layout, case, expected[case.name], results)
    pairs = [(f"{expected_folder}/{case.name}", f"{tmp_path}/{case.name}") for case in CASES]
    for case, (worst, parameter) in zip(CASES, run_ranks(1, compare_gradients, pairs)[0], strict=True):
        assert worst < 1e-5, f"{case.name}: gradient of {parameter} off by {worst:.1e} of its largest element"


def _check_index(layout: Layout, case: Case, expected: dict, ranks: list[dict]) -> None:
    """One index a microbatch and sequence shard, where it is made, equal to the single process's."""
    made = [rank for rank in ranks if rank["index_calls"]]
    if case.cross_attention == "dense":
        assert not made
        return
    for rank in made:
        assert rank["index_calls"] == 4 // layout.dp, case.name
    assert len(made) == layout.tp * layout.cp * layout.dp
    if layout.dp == 1:
        assert all(rank["index"] == expected["index"] for rank in made), case.name
