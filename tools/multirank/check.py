"""Holds every parallel layout of a world to one process: losses, gradients, the index, resume and reshard.

Owns the comparison and its tolerances; the step is `layouts.py`'s, the ranks are `ranks.py`'s.

The rule: a layout's error against one fp32 process on the CPU is at most twice that of one process in the
layout's dtype, on its kind of device and with its layers, plus a floor for sums taken in another order
(FLOOR, relative to a tensor's largest element). Over gloo in fp32 both are the same: only the floor is left.
"""

from dataclasses import dataclass, replace

import torch

from multirank.layouts import Case, Layout, Workload, gradient_errors, save_weights, steps
from multirank.resume import resumed_step, uninterrupted

LAYERS = 8
FLOOR = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
# Adam divides a gradient by its own size, so that the last bits of a small one move a weight in full.
RESUME_FLOOR = {torch.float32: 1e-4, torch.bfloat16: 2**-7}


@dataclass(frozen=True)
class Expected:
    """What one process found: results and gradient folder in fp32 on the CPU, and as the layouts compute."""

    exact: dict
    exact_folder: str
    same: dict
    same_folder: str


def layouts_of(world: int, layers: int = LAYERS) -> dict[str, Layout]:
    """Every TP x PP x CP x DP of powers of two that fills the world, pipelines interleaved as well."""
    powers = [1 << i for i in range(world.bit_length()) if 1 << i <= world]
    found = {}
    for tp in powers:
        for pp in powers:
            for cp in powers:
                if world % (tp * pp * cp):
                    continue
                layout = Layout(tp, pp, cp, world // (tp * pp * cp))
                found[name_of(layout)] = layout
                if pp > 1 and layers % (2 * pp) == 0:
                    found[name_of(replace(layout, vpp=2))] = replace(layout, vpp=2)
    return found


def name_of(layout: Layout) -> str:
    """As `tp2_cp2`, sizes of 1 left out."""
    sizes = {"tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp or 1, "cp": layout.cp, "dp": layout.dp}
    return "_".join(f"{key}{size}" for key, size in sizes.items() if size > 1) or "single"


TINY = dict(seq=32, vocab=64), {}
# Widths that the GPU kernels serve; the window's halo fits a chunk of 8 context-parallel ranks.
SMALL = (
    dict(seq=1024, vocab=512),
    dict(
        hidden_size=256,
        ffn_hidden_size=512,
        kv_channels=64,
        sliding_window=48,
        index_topk=128,
        index_head_dim=64,
        init_method_std=0.07,
    ),
)


def cases_of(world: int, dtype: torch.dtype, impl: str = "local", size=TINY) -> list[Case]:
    """Each loss and phase once; heads and microbatches enough for any layout of the world."""
    lengths, widths = size
    work = Workload(num_micro=max(4, world), dtype=dtype, impl=impl, **lengths)
    heads = dict(num_attention_heads=max(4, world), num_query_groups=max(2, world))
    shared = dict(work=work, overrides=dict(num_layers=LAYERS) | heads | widths)
    return [
        Case("dense", cross_attention="dense", trainable="backbone", **shared),
        Case("sparse", kd_loss="selected", **shared),
        Case("warmup", cross_attention="dense", kd_loss="full", trainable="indexer", **shared),
    ]


def most_trained(cases: list[Case]) -> Case:
    """The case whose optimizer has the most to save and reshard."""
    return max(cases, key=lambda case: ["indexer", "backbone", "all"].index(case.trainable))


def reference_of(case: Case) -> Case:
    """The same case in fp32 and plain torch."""
    return replace(case, work=replace(case.work, dtype=torch.float32, impl="local"))


def expected_of(ranks, cases: list[Case], folder: str) -> Expected:
    """Weights are written to `folder/weights`, the single process's gradients beside them."""
    exact_cases = [reference_of(case) for case in cases]
    weights, exact_folder, same_folder = (f"{folder}/{name}" for name in ("weights", "fp32", "same"))
    on_cpu = torch.cuda.is_available()  # without a GPU every process is on the CPU
    exact = ranks.alone(_first_steps, exact_cases, weights, exact_folder, on_cpu=on_cpu)
    if cases == exact_cases and not on_cpu:
        return Expected(exact, exact_folder, exact, exact_folder)
    same = ranks.alone(steps, Layout(), cases, weights, same_folder)
    return Expected(exact, exact_folder, same, same_folder)


def _first_steps(cases: list[Case], weights: str, folder: str) -> dict:
    save_weights(weights, cases[0])
    return steps(Layout(), cases, weights, folder)


def check_layout(ranks, name: str, layout: Layout, cases: list[Case], expected: Expected, folder: str):
    """One row a case."""
    results = ranks.everywhere(steps, layout, cases, f"{folder}/weights", f"{folder}/{name}")
    for case in cases:
        own = [rank[case.name] for rank in results]
        errors = ranks.alone(
            errors_of, *(f"{base}/{case.name}" for base in (expected.exact_folder, expected.same_folder)),
            f"{folder}/{name}/{case.name}", FLOOR[case.work.dtype],
        )  # fmt: skip
        loss, loss_limit = _loss_error(own, case, expected)
        row = {"layout": name, "case": case.name, "loss_error": loss, "loss_limit": loss_limit, **errors}
        row["index"] = index_verdict(layout, case, own, expected)
        row["ok"] = loss <= loss_limit and row["gradient_error"] <= row["gradient_limit"]
        row["ok"] &= row["index"] in ("identical", "none")
        yield row


def errors_of(exact: str, same: str, actual: str, floor: float) -> dict:
    """The parameter whose gradient comes closest to its limit, or exceeds it most."""
    found = gradient_errors(exact, actual)
    alone = gradient_errors(exact, same)
    key = max(found, key=lambda key: found[key] / (2 * alone[key] + floor))
    return {"gradient_error": found[key], "gradient_limit": 2 * alone[key] + floor, "parameter": key}


def _loss_error(results: list[dict], case: Case, expected: Expected) -> tuple[float, float]:
    """Largest relative error of a reported loss, and its limit."""
    exact, same = (found[case.name]["reports"] for found in (expected.exact, expected.same))
    reports = [result["reports"] for result in results if result["reports"]]
    error = max(_relative(report, exact) for report in reports) if reports else float("inf")
    return error, 2 * _relative(same, exact) + FLOOR[case.work.dtype] / 10


def _relative(losses: dict, exact: dict) -> float:
    return max(abs(losses[key] - exact[key]) / max(abs(exact[key]), 1.0) for key in exact)


def index_verdict(layout: Layout, case: Case, results: list[dict], expected: Expected) -> str:
    """Each rank that reads an index must read one a microbatch, and all the same; in fp32 the reference's."""
    if case.cross_attention == "dense":
        return "none" if not any(result["index_calls"] for result in results) else "made without need"
    readers = [set(result["index_used"]) for result in results if result["index_used"]]
    whole = set().union(*readers)
    if not readers or len(whole) != case.work.num_micro:
        return f"{len(whole)} indices for {case.work.num_micro} microbatches"
    if any(len(reader) != case.work.num_micro // layout.dp for reader in readers):
        return "a rank misses a microbatch"
    if case.work.dtype == torch.float32 and whole != set(expected.same[case.name]["index_used"]):
        return "not the single process's"
    return "identical"


def check_resume(ranks, layouts: dict[str, Layout], case: Case, folder: str):
    """One row a layout, which resumes the one before it; at the end one process resumes the last."""
    chain = {**layouts, "single": Layout()}
    same = ranks.alone(uninterrupted, case, f"{folder}/weights", f"{folder}/step0", len(chain) + 1)
    exact, on_cpu = same, torch.cuda.is_available()
    if case != reference_of(case) or on_cpu:
        source = f"{folder}/weights", f"{folder}/fp32_step0", len(chain) + 1
        exact = ranks.alone(uninterrupted, reference_of(case), *source, on_cpu=on_cpu)
    before = "single"
    for done, (name, layout) in enumerate(chain.items(), start=1):
        steps_folders = f"{folder}/step{done - 1}", f"{folder}/step{done}"
        try:
            found = ranks.everywhere(resumed_step, layout, case, *steps_folders, world=layout.world)
        except AssertionError as failure:  # nothing was saved that the next layout could resume
            yield {"layout": name, "case": f"resume {before}", "ok": False, "error": str(failure)}
            return
        error = max(_relative(losses, exact[done]) for losses in found if losses)
        limit = 2 * _relative(same[done], exact[done]) + RESUME_FLOOR[case.work.dtype]
        row = {"layout": name, "case": f"resume {before}", "loss_error": error, "loss_limit": limit}
        yield row | {"ok": error <= limit}
        before = name
