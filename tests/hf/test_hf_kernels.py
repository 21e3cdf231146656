"""The kernels' path of the Hugging Face model gives what the masked path gives, or steps aside.

Owns no kernel (tests/kernels) and no device (test_hf_gpu.py): the dispatcher serves plain torch here, and
once Triton's interpreter.
"""

import pytest
import torch
import triton_interpreter  # noqa: F401  (repairs it)
from hf_tiny import LONG, TOPK, tiny_model, tokens
from transformers import DynamicCache, StaticCache

from megatron_clsa.hf import kernels_clsa
from megatron_clsa.kernels import dispatch
from megatron_clsa.kernels.indexer_topk import triton_topk
from megatron_clsa.kernels.sparse_choice import make_plan

NAME = kernels_clsa.NAME


def pair(**changes):
    """The same weights twice: through the kernels, through masks."""
    models = tiny_model(**changes), tiny_model(**changes)
    for model, implementation in zip(models, (NAME, "sdpa"), strict=True):
        model.set_attn_implementation(implementation)
    return models


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, int]]:
    """Rows and keys of every call of the kernels' attention."""
    made, run = [], dispatch.sparse_attention

    def counted(query, key, *rest):
        made.append((query.shape[1], key.shape[1]))
        return run(query, key, *rest)

    monkeypatch.setattr(dispatch, "sparse_attention", counted)
    return made


def left_padded(pads: int = 9) -> dict:
    ids, mask = tokens(LONG, batch=2), torch.ones(2, LONG, dtype=torch.long)
    mask[0, :pads] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def right_padded() -> dict:
    padded = left_padded()
    return {name: tensor.flip(1) for name, tensor in padded.items()}


def packed() -> dict:
    positions = torch.cat([torch.arange(18), torch.arange(LONG - 18)])
    return {"input_ids": tokens(LONG, batch=2), "position_ids": positions.expand(2, -1)}


def masked_in_4d() -> dict:
    mask = torch.ones(LONG, LONG, dtype=torch.bool).tril().triu(-25)[None, None]
    return {"input_ids": tokens(LONG, batch=2), "attention_mask": mask}


def kept_rows() -> dict:
    return {"input_ids": tokens(LONG, batch=2), "logits_to_keep": 5}


INPUTS = [left_padded, right_padded, packed, masked_in_4d, kept_rows]


@torch.no_grad()
@pytest.mark.parametrize("inputs", INPUTS)
def test_logits_equal_the_masked_path(inputs, calls):
    kernels, masks = pair(cross_qk_norm=True)
    given = inputs()
    actual, expected = kernels(**given).logits, masks(**given).logits
    assert calls == [(given.get("logits_to_keep", LONG), LONG)] * 3
    seen = given["attention_mask"].bool() if "padded" in inputs.__name__ else slice(None)
    torch.testing.assert_close(actual[seen], expected[seen], rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cached_chunks_equal_one_pass(kind, calls):
    kernels, masks = pair()
    ids, config = tokens(LONG, batch=2), kernels.config
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=64)
    parts = [kernels(part, past_key_values=cache).logits for part in ids.split(20, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), masks(ids).logits, rtol=0, atol=5e-5)
    assert {rows for rows, _ in calls} == {20}  # the last chunk is one row, which decodes


@torch.no_grad()
def test_triton_in_the_interpreter_gives_the_same_logits(monkeypatch):
    kernels, masks = pair()
    monkeypatch.setattr(dispatch, "build_plan", make_plan)
    monkeypatch.setattr(dispatch, "topk_index", triton_topk)
    given = left_padded()
    actual, expected = kernels(**given).logits, masks(**given).logits
    seen = given["attention_mask"].bool()
    torch.testing.assert_close(actual[seen], expected[seen], rtol=0, atol=2e-5)


def gradients(model, ids) -> dict:
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("coefficient", [0.0, 0.1])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradients_equal_the_masked_path(reentrant, coefficient, calls):
    kernels, masks = (model.train() for model in pair(indexer_loss_coef=coefficient))
    if reentrant is not None:
        kernels.gradient_checkpointing_enable({"use_reentrant": reentrant})
        kernels.enable_input_require_grads()
    ids = tokens(LONG, batch=2)
    actual, expected = gradients(kernels, ids), gradients(masks, ids)
    assert calls and actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("inputs", [left_padded, packed])
def test_the_indexers_loss_equals_the_masked_path(inputs):
    kernels, masks = pair(indexer_loss_coef=0.5, index_qk_norm=True)
    given = inputs()
    labels = given["input_ids"].masked_fill(given["input_ids"] == 0, -100)
    actual, expected = (model(**given, labels=labels).indexer_loss.item() for model in (kernels, masks))
    assert actual == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_a_mask_with_gaps_keeps_the_masked_path(calls):
    kernels, masks = pair()
    given = left_padded()
    given["attention_mask"][:, 20] = 0
    actual, expected = kernels(**given).logits, masks(**given).logits
    assert not calls and torch.equal(actual[1, 21:], expected[1, 21:])


@torch.no_grad()
@pytest.mark.parametrize("length", [TOPK, 1])
def test_short_calls_keep_the_masked_path(length, calls):
    kernels, masks = pair()
    ids = tokens(length)
    assert torch.equal(kernels(ids).logits, masks(ids).logits) and not calls


@torch.no_grad()
def test_layers_on_other_devices_keep_the_masked_path(calls):
    accelerate = pytest.importorskip("accelerate")
    kernels, masks = pair()
    ids = tokens(LONG)
    accelerate.cpu_offload(kernels, execution_device=torch.device("cpu"))
    assert torch.equal(kernels(ids).logits, masks(ids).logits) and not calls


def test_where_the_package_is_missing_it_is_not_chosen_and_asking_for_it_says_so(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels_clsa, "import_module", missing)
    assert not kernels_clsa.automatic.__wrapped__()
    with pytest.raises(ImportError, match="needs the package megatron_clsa"):
        tiny_model().set_attn_implementation(NAME)


def test_on_a_gpu_with_the_package_it_is_chosen_unless_another_is_asked_for(monkeypatch):
    monkeypatch.setattr("megatron_clsa.hf.modeling_clsa.automatic", lambda: True)
    assert tiny_model().config._attn_implementation == NAME
    assert tiny_model(attn_implementation="sdpa").config._attn_implementation == "sdpa"
    assert NAME not in tiny_model().config.to_json_string()
