"""One recipe on one GPU, with both specs and both precisions, against the same recipe on the CPU.

All five runs start together: starting is nearly all that they do, and each uses a sliver of the GPU.
"""

import subprocess

import pytest
from runs import ENVIRONMENT, command, metrics

from megatron_clsa.training.arguments import have_transformer_engine

pytestmark = pytest.mark.gpu

# bf16 keeps 8 bits: an activation is off by up to 2^-9 = 2e-3 of itself, and 20 updates differ by as much.
# Measured on an H100 against the CPU's fp32 run: 8e-4 at step 20 of a loss of 3.9.
BF16 = 5e-3
LOCAL, TE = ["--transformer-impl=local"], ["--transformer-impl=transformer_engine"]
RUNS = {
    "cpu": [],
    "local_fp32": LOCAL,
    "local_bf16": [*LOCAL, "--bf16"],
    "te_fp32": TE,
    "te_bf16": [*TE, "--bf16"],
}


def _start(name: str, folder) -> subprocess.Popen:
    # Compiling Megatron's fused functions takes longer than the runs and changes no more than rounding.
    environment = ENVIRONMENT | {"TORCHDYNAMO_DISABLE": "1"}
    if name == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            command(folder / "out", *RUNS[name]), env=environment, stdout=log, stderr=subprocess.STDOUT
        )


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """Name of a run -> (phase, LM loss, distillation loss) of each of its steps."""
    names = [name for name in RUNS if not name.startswith("te_") or have_transformer_engine()]
    folders = {name: tmp_path_factory.mktemp(name) for name in names}
    started = {name: _start(name, folder) for name, folder in folders.items()}
    try:
        for process in started.values():
            process.wait(timeout=600)
    finally:
        for process in started.values():
            process.kill()

    def of(name: str) -> list[tuple[str, float, float]]:
        assert started[name].returncode == 0, (folders[name] / "log").read_text()[-3000:]
        lines = metrics(folders[name] / "out")
        return [(m["phase"], m["lm_loss"], m["kd_loss"]) for m in lines if "lm_loss" in m]

    return of


@pytest.mark.parametrize(
    "name, reference, tolerance",
    [
        ("local_fp32", "cpu", 1e-4),
        ("local_bf16", "cpu", BF16),
        # Its fp32 linears multiply in TF32, 11 bits.
        pytest.param("te_fp32", "cpu", 1e-3, marks=pytest.mark.te),
        pytest.param("te_bf16", "cpu", BF16, marks=pytest.mark.te),
        pytest.param("te_bf16", "local_bf16", BF16, marks=pytest.mark.te),
    ],
)
def test_a_run_on_the_gpu_logs_the_losses_of_the_reference(losses, name, reference, tolerance):
    expected, actual = losses(reference), losses(name)
    assert len(actual) == len(expected) == 20
    for (phase, lm, kd), (same_phase, wanted_lm, wanted_kd) in zip(actual, expected, strict=True):
        assert phase == same_phase
        assert lm == pytest.approx(wanted_lm, abs=tolerance)
        assert kd == pytest.approx(wanted_kd, abs=tolerance)
