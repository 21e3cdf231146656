"""What the estimator says of a benchmark's step, to stand beside what was measured.

Owns no formula: they are megatron_clsa/estimate's.
"""

from megatron_clsa.estimate import flops, links, speed
from megatron_clsa.estimate.shape import RunShape
from multirank.layouts import Case, Layout, make_config

LINK_BYTES = 450e9  # NVLink of an H100, one direction, by its data sheet


def run_shape(layout: Layout, case: Case, impl: str) -> RunShape:
    """The estimator's view of the step."""
    work = case.work
    batch = work.micro * work.num_micro
    config = make_config(layout, case)
    return RunShape(
        config,
        work.vocab,
        work.seq,
        work.micro,
        batch,
        layout.world,
        dtype_bytes=work.dtype.itemsize,
        backend=impl,
    )


def of_step(layout: Layout, case: Case, impl: str, measured_ms: float) -> dict:
    """Figures of a row: ceiling, MFU measured and predicted, bytes by link."""
    run = run_shape(layout, case, impl)
    machine = speed.Machine()
    peak = layout.world * machine.peak_tflops * 1e12
    predicted = speed.predict(run, machine)
    ceiling = flops.total(run) / peak
    return {
        "ceiling": round(1e3 * ceiling, 4),
        "mfu": round(1e3 * ceiling / measured_ms, 4),
        "predicted_ms": round(1e3 * predicted.seconds, 3),
        "predicted_mfu": round(predicted.mfu, 4),
        "estimated_mib": {link: round(size / 2**20, 3) for link, size in links.of_step(run).items()},
    }
