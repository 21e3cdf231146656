"""Holds every parallel layout of a world to one process: losses, gradients, the index, resume and reshard.

Owns the comparison and its tolerances; the step is `layouts.py`'s, the ranks are `ranks.py`'s.

The rule: a layout's error against one fp32 process on the CPU is at most twice that of one process in the
layout's dtype, on its kind of device and with its layers, plus a floor for sums taken in another order
(FLOOR, relative to a tensor's largest element). Over gloo in fp32 both are the same: only the floor is left.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from statistics import median

import torch

from multirank.layouts import Case, Layout, Workload, gradient_distances, gradient_errors, save_weights, steps
from multirank.resume import resumed_step, uninterrupted

LAYERS = 8
FLOOR = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
# Adam divides a gradient by its own size, so that the last bits of a small one move a weight in full.
RESUME_FLOOR = {torch.float32: 1e-4, torch.bfloat16: 2**-7}


@dataclass(frozen=True)
class Expected:
    """What one process found.

    Attributes:
        exact, same: results by case, in fp32 on the CPU, and as the layouts compute.
        errors: of the latter's gradients, by case and parameter; empty where both are the same process.
        step0: folder of the state after one optimizer step, which the first layout resumes.
        exact_losses, same_losses: of further optimizer steps; the former may have to be waited for.
    """

    exact: dict
    same: dict
    errors: dict[str, dict[str, float]]
    step0: str
    exact_losses: Callable[[], list[dict]]
    same_losses: list[dict]


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
    dict(seq=1024, vocab=512, micro=1),
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
    heads = dict(num_attention_heads=max(4, 2 * world), num_query_groups=max(2, world))
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


def expected_of(ranks, cases: list[Case], folder: str, count: int) -> Expected:
    """What one process finds; `count` optimizer steps follow the gradients (0: none).

    Weights are written to `folder/weights`, gradients beside them. The fp32 process works aside: on a machine
    with GPUs it goes on while the ranks take their turns.
    """
    weights, long = f"{folder}/weights", 4 * ranks.limit
    exact_cases = [reference_of(case) for case in cases]
    ranks.aside(save_weights, weights, exact_cases[0])()
    found = ranks.aside(exact_steps, steps, exact_cases, folder, limit=long)
    chain = ranks.aside(_chain, exact_cases, weights, f"{folder}/exact_step0", count, limit=4 * long)
    if cases == exact_cases and ranks.backend == "gloo":
        exact, losses = found(), chain()
        return Expected(exact, exact, {}, f"{folder}/exact_step0", lambda: losses, losses)
    exact = found()
    given = given_folder(cases, folder)
    same = ranks.alone(compact_steps, steps, Layout(), cases, weights, f"{folder}/same", given, limit=long)
    same_losses = ranks.alone(_chain, cases, weights, f"{folder}/same_step0", count, limit=long)
    errors = ranks.alone(_errors, cases, f"{folder}/exact", f"{folder}/same")
    return Expected(exact, same, errors, f"{folder}/same_step0", cache(chain), same_losses)


def _chain(cases: list[Case], weights: str, target: str, count: int) -> list[dict]:
    return uninterrupted(most_trained(cases), weights, target, count) if count else []


def exact_steps(steps, cases: list[Case], folder: str) -> dict:
    """What the fp32 process finds; its selection is kept in `folder/index`."""
    results = steps(Layout(), cases, f"{folder}/weights", f"{folder}/exact")
    os.makedirs(f"{folder}/index")
    for case, result in results.items():
        if result["index"]:
            torch.save(
                [torch.tensor(x, dtype=torch.int32) for x in result["index"]], f"{folder}/index/{case}.pt"
            )
        result["index"] = None
    return results


def given_folder(cases: list[Case], folder: str) -> str | None:
    """Where the selection to attend to lies. In bf16 near ties fall otherwise with every order of sums, each
    at the cost of a gradient's jump: there every process attends to what the fp32 process selected."""
    return f"{folder}/index" if cases[0].work.dtype != torch.float32 else None


def compact_steps(steps, *args) -> dict:
    """`steps(*args)` without the indices themselves, of which the digests tell all."""
    return {case: result | {"index": None} for case, result in steps(*args).items()}


def _errors(cases: list[Case], exact: str, actual: str) -> dict[str, dict[str, float]]:
    """Of each case, every parameter's gradient error: the worst element's in fp32, the tensor's norm in bf16.

    A 16-bit gradient's worst element is mostly chance: sums in another order move it twofold.
    """
    error = gradient_errors if cases[0].work.dtype == torch.float32 else gradient_distances
    return {case.name: error(f"{exact}/{case.name}", f"{actual}/{case.name}") for case in cases}


def one_layout(steps, layout: Layout, cases: list[Case], folder: str, name: str, resume: tuple | None):
    """On each rank, two answers: (results of `steps`, gradient errors), and the resumed step's losses.

    All ranks read the gradients' files, as reading them takes a collective. `resume`: source and target.
    """
    given = given_folder(cases, folder)
    results = compact_steps(steps, layout, cases, f"{folder}/weights", f"{folder}/{name}", given)
    yield results, _errors(cases, f"{folder}/exact", f"{folder}/{name}")
    if resume:
        yield resumed_step(layout, most_trained(cases), *resume)


def check_layout(layout: Layout, name: str, cases: list[Case], expected: Expected, found: list):
    """One row a case of what the ranks found."""
    for case in cases:
        own = [results[case.name] for results, _ in found]
        alone, floor = expected.errors.get(case.name), FLOOR[case.work.dtype]
        gradient = worst_gradient(found[0][1][case.name], alone, floor)
        loss, loss_limit = _loss_error(own, case, expected)
        row = {"layout": name, "case": case.name, "loss_error": loss, "loss_limit": loss_limit, **gradient}
        row["index"] = index_verdict(layout, case, own, expected)
        if agreements := [result["agreement"] for result in own if result.get("agreement") is not None]:
            row["agreement"] = min(agreements)
        row["ok"] = loss <= loss_limit and row["gradient_error"] <= row["gradient_limit"]
        row["ok"] &= row["index"] in ("identical", "none")
        yield row


def check_layouts(ranks, layouts: dict[str, Layout], cases: list[Case], folder: str, resume: bool):
    """Rows of every layout, each as soon as it is known; a layout that fails leaves the others their turn.

    With `resume` each layout resumes the last one that saved, and in the end one process the last of all.
    """
    chain = layouts | ({"single": Layout()} if resume else {})
    expected = expected_of(ranks, cases, folder, len(chain) + 1 if resume else 0)
    before, source, done = "single", expected.step0, 0
    for number, (name, layout) in enumerate(chain.items()):
        target = f"{folder}/step{number}"
        last = resume and number == len(layouts)
        calls = _parts(ranks, last, layout, cases, folder, name, (source, target) if resume else None)
        case = "all"
        try:
            if not last:
                yield from check_layout(layout, name, cases, expected, next(calls))
            if resume:
                case = f"resume {before}"
                losses = next(calls)
                done += 1
                yield _resume_row(name, case, losses, expected, done, most_trained(cases))
                before, source = name, target
        except AssertionError as error:  # a rank's traceback, or that it did not answer in time
            yield {"layout": name, "case": case, "ok": False, "error": str(error)}


def _parts(ranks, last: bool, layout: Layout, cases: list[Case], folder: str, name: str, resume):
    if last:
        yield [ranks.alone(resumed_step, layout, most_trained(cases), *resume)]
    else:
        parts = 2 if resume else 1
        yield from ranks.in_parts(parts, one_layout, steps, layout, cases, folder, name, resume)


def _resume_row(name: str, case_name: str, found: list, expected: Expected, done: int, case: Case) -> dict:
    exact, same = expected.exact_losses()[done], expected.same_losses[done]
    error = max(_relative(losses, exact) for losses in found if losses)
    limit = 2 * _relative(same, exact) + RESUME_FLOOR[case.work.dtype]
    row = {"layout": name, "case": case_name, "loss_error": error, "loss_limit": limit}
    return row | {"ok": error <= limit}


def worst_gradient(found: dict[str, float], alone: dict[str, float] | None, floor: float) -> dict:
    """The parameter whose gradient comes closest to its limit, or exceeds it most."""
    middle = median(alone.values()) if alone else 0.0  # one that came out lucky is held to the middle of all
    limits = {key: 2 * max(alone[key] if alone else 0.0, middle) + floor for key in found}
    # Written so that an error of NaN is the worst of all.
    key = max(found, key=lambda key: found[key] / limits[key] if found[key] == found[key] else float("inf"))
    return {"gradient_error": found[key], "gradient_limit": limits[key], "parameter": key}


def _loss_error(results: list[dict], case: Case, expected: Expected) -> tuple[float, float]:
    """Largest relative error of a reported loss, and its limit."""
    exact, same = (found[case.name]["reports"] for found in (expected.exact, expected.same))
    reports = [result["reports"] for result in results if result["reports"]]
    error = max(_relative(report, exact) for report in reports) if reports else float("inf")
    return error, 2 * _relative(same, exact) + FLOOR[case.work.dtype] / 10


def _relative(losses: dict, exact: dict) -> float:
    return max(abs(losses[key] - exact[key]) / max(abs(exact[key]), 1.0) for key in exact)


def index_verdict(layout: Layout, case: Case, results: list[dict], expected: Expected) -> str:
    """Each rank that reads an index must read one a microbatch, and all the same: the single process's."""
    if case.cross_attention == "dense":
        return "none" if not any(result["index_calls"] for result in results) else "made without need"
    readers = [set(result["index_used"]) for result in results if result["index_used"]]
    whole = set().union(*readers)
    if not readers or len(whole) != case.work.num_micro:
        return f"{len(whole)} indices for {case.work.num_micro} microbatches"
    if any(len(reader) != case.work.num_micro // layout.dp for reader in readers):
        return "a rank misses a microbatch"
    if whole != set(expected.same[case.name]["index_used"]):
        return "not the single process's"
    return "identical"
