"""The model on one rank equals a float64 plain-torch CLSA: losses, and the gradient of every parameter."""

import pytest
import torch
from layouts import Case, Layout, batches, make_config, save_weights, step
from megatron.core import dist_checkpointing
from plain_clsa import PlainCLSA
from ranks import run_ranks

CASES = [
    Case("dense", cross_attention="dense", trainable="backbone"),
    Case("sparse"),
    Case("sparse_selected", kd_loss="selected"),
    Case("sparse_full", kd_loss="full"),
    Case("warmup", cross_attention="dense", kd_loss="full", trainable="indexer"),
    Case("detached", kd_loss="selected", overrides=dict(indexer_detach_input=True)),
]


def _compare(case: Case, weights: str, folder: str) -> dict:
    """Runs on one rank: the model's step, the plain model's, and their largest differences."""
    result = step(Layout(), case, weights, folder)
    config = make_config(Layout(), case)
    plain = {
        k: v.double().requires_grad_() for k, v in dist_checkpointing.load_plain_tensors(weights).items()
    }
    lm, kd, count = _plain_sums(PlainCLSA(config, plain), case)
    loss = lm if case.kd_loss == "off" else lm + config.kd_loss_coeff * kd
    if case.trainable == "indexer":
        loss = kd * config.kd_loss_coeff
    grads = torch.autograd.grad(loss / count, list(plain.values()), allow_unused=True)
    actual = dist_checkpointing.load_plain_tensors(folder)
    worst = {name: _difference(g, actual[name]) for name, g in zip(plain, grads, strict=True)}
    trained = [n for n in plain if _trains(n, case)]
    return {
        "lm": (result["reports"]["lm"], (lm / count).item()),
        "kd": (result["reports"]["kd"], (kd / count).item()),
        "worst": max((worst[n], n) for n in trained),
        "zero": [n for n in trained if not actual[n].any()],
        "frozen": [n for n in plain if n not in trained and actual[n].any()],
    }


def _plain_sums(model: PlainCLSA, case: Case):
    lm = kd = count = 0
    for batch in batches(case):
        for tokens, labels, positions, mask in zip(
            batch["tokens"], batch["labels"], batch["position_ids"], batch["loss_mask"], strict=True
        ):
            row_lm, row_kd = model.losses(tokens, labels, torch.arange(len(tokens)) - positions)
            lm, kd, count = lm + (row_lm * mask).sum(), kd + (row_kd * mask).sum(), count + mask.sum()
    return lm, kd, count


def _trains(name: str, case: Case) -> bool:
    if case.trainable == "all":
        return ".indexer." not in name or case.kd_loss != "off"
    return (case.trainable == "indexer") == (".indexer." in name)


def _difference(expected, actual) -> float:
    expected = torch.zeros_like(actual).double() if expected is None else expected
    return float((expected - actual.double()).abs().max() / expected.abs().max().clamp(min=1e-6))


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("weights"))
    run_ranks(1, save_weights, folder)
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_losses_and_gradients_equal_plain_float64_model(case, weights, tmp_path):
    result = run_ranks(1, _compare, case, weights, str(tmp_path))[0]
    assert result["lm"][0] == pytest.approx(result["lm"][1], rel=1e-5)
    if case.kd_loss != "off":
        assert result["kd"][0] == pytest.approx(result["kd"][1], rel=1e-5)
    assert result["zero"] == [] and result["frozen"] == []
    # fp32 against float64 through eight layers: rounding reaches 1e-5 of a gradient's largest element.
    assert result["worst"][0] < 1e-4, result["worst"]
