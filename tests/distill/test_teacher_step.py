"""A step under a dense teacher equals plain float64 torch, at any layout of student and of teacher.

Losses and the gradient of every parameter: LM loss, KL of the top k at a temperature, matched hidden states
and, in the sparse phase, the index's own loss beside them. Tolerances: tests/parallel/test_layouts.py.
"""

import pytest
import torch
from layouts import Case, Layout, batches, build, compare_gradients, make_config, save_weights
from megatron.core import dist_checkpointing
from plain_clsa import PlainCLSA
from ranks import run_ranks
from taught import (
    HIDDEN,
    KL,
    LAYER_MAP,
    LM,
    TEMPERATURE,
    TOP_K,
    VOCABULARY,
    Taught,
    save_teacher,
    taught_steps,
)
from transformers import AutoModelForCausalLM

CASES = [
    Case("heal", cross_attention="dense", trainable="backbone"),
    Case("sparse", kd_loss="selected"),
]
FULL_RECOMPUTE = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=3)
TP2, CP2, DP2, PP2 = Layout(tp=2), Layout(cp=2), Layout(dp=2), Layout(pp=2)
LAYOUTS = {
    "tp2": Taught(TP2),
    "tp2_teacher_tp2": Taught(TP2, dict(tensor_parallel=2)),
    "dp2_teacher_tp2": Taught(DP2, dict(tensor_parallel=2)),
    "dp2_teacher_shards2": Taught(DP2, dict(shards=2)),
    "cp2_teacher_tp2": Taught(CP2, dict(tensor_parallel=2)),
    "pp2": Taught(PP2),
    "pp2_teacher_tp2": Taught(PP2, dict(tensor_parallel=2)),
    "pp2_vpp2_teacher_shards2": Taught(Layout(pp=2, vpp=2), dict(shards=2)),
    "tp2_pp2_teacher_tp4": Taught(Layout(tp=2, pp=2), dict(tensor_parallel=4)),
    "cp2_dp2_teacher_tp2": Taught(Layout(cp=2, dp=2, config=FULL_RECOMPUTE), dict(tensor_parallel=2)),
}

SLOW = {"pp2", "pp2_teacher_tp2", "dp2_teacher_shards2"}  # what others hold too


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("weights"))
    run_ranks(1, save_weights, folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return str(save_teacher(tmp_path_factory.mktemp("teacher")))


@pytest.fixture(scope="module")
def single(weights, teacher, tmp_path_factory) -> tuple[dict, str]:
    """Losses and the gradients' folder of one process."""
    folder = str(tmp_path_factory.mktemp("single"))
    return run_ranks(1, taught_steps, Taught(), CASES, weights, teacher, folder)[0], folder


class PlainTaught(PlainCLSA):
    """Keeps each layer's output and the logits of the last sequence."""

    def mlp(self, x, i):
        self.states[i + 1] = super().mlp(x, i)
        return self.states[i + 1]

    def norm(self, x, name):
        out = super().norm(x, name)
        if name == "decoder.final_layernorm.weight":
            self.logits = out @ self.w["output_layer.weight"].T
        return out

    def losses(self, *sequence):
        self.states = {}
        return super().losses(*sequence)


def _coarse_kl(teacher_logits, logits):
    """Of the teacher's likeliest tokens and all others as one outcome, both at the temperature."""
    p = (teacher_logits[:, :VOCABULARY] / TEMPERATURE).softmax(-1)
    q = (logits / TEMPERATURE).softmax(-1)
    ids = p.topk(TOP_K).indices

    def merge(x):
        kept = x.gather(-1, ids)
        return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1)

    return (merge(p) * (merge(p) / merge(q)).log()).sum(-1)


def _unit(x):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def _read(teacher, tokens, start) -> tuple[torch.Tensor, tuple]:
    """Logits and each layer's output, one document at a time."""
    layers, kept = teacher.model.layers, {}
    hooks = [
        layer.register_forward_hook(lambda m, a, out, n=n: kept.setdefault(n, []).append(out[0]))
        for n, layer in enumerate(layers, 1)
    ]
    logits = [
        teacher(tokens[start == first][None], use_cache=False).logits[0] for first in start.unique().tolist()
    ]
    for hook in hooks:
        hook.remove()
    return torch.cat(logits), {n: torch.cat(parts) for n, parts in kept.items()}


def _plain(case: Case, weights: str, folder: str) -> tuple[dict, dict]:
    """Mean losses and every gradient of the batch, in float64."""
    config = make_config(Layout(), case)
    plain = {
        k: v.double().requires_grad_() for k, v in dist_checkpointing.load_plain_tensors(weights).items()
    }
    student = PlainTaught(config, plain)
    teacher = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    sums = dict.fromkeys(("lm loss", "kd loss", "teacher_kl", "hidden_loss"), 0.0)
    rows = 0
    for batch in batches(case):
        names = ("tokens", "labels", "position_ids", "loss_mask")
        for tokens, labels, positions, mask in zip(*(batch[name] for name in names), strict=True):
            start = torch.arange(len(tokens)) - positions
            lm, kd = student.losses(tokens, labels, start)
            with torch.no_grad():
                logits, states = _read(teacher, tokens, start)
            gaps = [_unit(student.states[s]) - _unit(states[t]) for s, t in LAYER_MAP.items()]
            distance = torch.stack(gaps).pow(2).mean((0, 2))
            parts = lm, kd, _coarse_kl(logits, student.logits), distance
            sums = {name: sums[name] + (part * mask).sum() for name, part in zip(sums, parts, strict=True)}
            rows += mask.sum()
    means = {name: total / rows for name, total in sums.items()}
    index = config.kd_loss_coeff if case.kd_loss != "off" else 0.0
    coefficients = LM, index, KL * TEMPERATURE**2, HIDDEN
    loss = sum(c * mean for c, mean in zip(coefficients, means.values(), strict=True))
    grads = torch.autograd.grad(loss, list(plain.values()), allow_unused=True)
    return {name: mean.item() for name, mean in means.items()}, dict(zip(plain, grads, strict=True))


def _against_plain(case: Case, weights: str, teacher: str, folder: str) -> tuple[dict, dict]:
    build(Layout(), case)  # a world of one, which `batches` asks for its share
    means, grads = _plain(case, weights, teacher)
    actual = dist_checkpointing.load_plain_tensors(folder)
    errors = {
        name: float((grad - actual[name].double()).abs().max() / grad.abs().max().clamp(min=1e-6))
        for name, grad in grads.items()
        if grad is not None
    }
    return means, errors


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_losses_and_gradients_equal_plain_float64(case, single, weights, teacher):
    losses, folder = single
    expected, errors = run_ranks(1, _against_plain, case, weights, teacher, f"{folder}/{case.name}")[0]
    for name, value in losses[case.name].items():
        if name != "kd loss" or case.kd_loss != "off":
            assert value == pytest.approx(expected[name], rel=1e-5), name
    assert len(errors) > 60 and max(errors.values()) < 1e-4, max(errors, key=errors.get)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in LAYOUTS]
)
def test_any_layout_of_student_and_teacher_takes_the_same_step(name, single, weights, teacher, tmp_path):
    taught, (expected, folder) = LAYOUTS[name], single
    ranks = run_ranks(taught.student.world, taught_steps, taught, CASES, weights, teacher, str(tmp_path))
    for case in CASES:
        last = [rank[case.name] for rank in ranks if rank[case.name]]
        assert len(last) == taught.student.world // taught.student.pp
        for losses in last:
            assert losses == pytest.approx(expected[case.name], rel=2e-6, abs=1e-6), case.name
    pairs = [(f"{folder}/{case.name}", f"{tmp_path}/{case.name}") for case in CASES]
    for case, (worst, parameter) in zip(CASES, run_ranks(1, compare_gradients, pairs)[0], strict=True):
        assert worst < 1e-5, f"{case.name}: gradient of {parameter} off by {worst:.1e} of its largest element"
