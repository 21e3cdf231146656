"""On a GPU, the kernels' path gives the logits, gradients and greedy tokens of the masked path.

Owns nothing that runs without a device (test_hf_kernels.py). A small model of the kernels' real tile sizes.
"""

import pytest
import torch
from hf_tiny import tiny_model, tokens

from megatron_clsa.hf.kernels_clsa import NAME
from megatron_clsa.kernels import dispatch, union_attention

pytestmark = pytest.mark.gpu
SHAPE = {
    "num_attention_heads": 8,
    "head_dim": 64,
    "index_head_dim": 64,
    "sliding_window": 96,
    "index_topk": 128,
}
LONG, SHORT, NEW = 700, 5, 12


def on_gpu(implementation: str | None = None, dtype=torch.float32, **changes):
    model = tiny_model(dtype=dtype, **SHAPE | changes).to("cuda")
    if implementation:
        model.set_attn_implementation(implementation)
    return model


def prompt(length: int, batch: int = 1, seed: int = 1):
    return tokens(length, batch, seed).cuda()


def test_a_gpu_gets_the_kernels_unasked():
    assert on_gpu().config._attn_implementation == NAME


@pytest.fixture
def plans(monkeypatch) -> list[bool]:
    """Whether Triton served, for every call of the kernels' attention."""
    made, run = [], dispatch.sparse_attention

    def counted(query, key, value, index, rows, scale, plan=None):
        made.append(plan is not None and union_attention.supported(query, key))
        return run(query, key, value, index, rows, scale, plan)

    monkeypatch.setattr(dispatch, "sparse_attention", counted)
    return made


@torch.no_grad()
def padded_logits(implementation: str, dtype=torch.float32):
    """Of every token of two rows of which one is padded."""
    ids, mask = prompt(LONG, batch=2), torch.ones(2, LONG, dtype=torch.long, device="cuda")
    mask[0, :37] = 0
    return on_gpu(implementation, dtype)(ids, attention_mask=mask).logits[mask.bool()].float()


def test_logits_equal_the_masked_path(plans):
    expected = padded_logits("sdpa")
    assert (padded_logits(NAME) - expected).abs().max() <= 1e-4 * expected.std()
    assert plans == [True] * 3


def test_bfloat16_logits_are_as_exact_as_the_masked_paths(plans):
    exact = padded_logits("sdpa")
    ours, theirs = ((padded_logits(name, torch.bfloat16) - exact).norm() for name in (NAME, "sdpa"))
    assert ours <= 1.1 * theirs and theirs < 0.1 * exact.norm()
    assert plans == [True] * 3


@pytest.mark.parametrize("coefficient", [0.0, 0.1])
def test_gradients_equal_the_masked_path(coefficient, plans):
    ids, found = prompt(LONG, batch=2), []
    for implementation in (NAME, "sdpa"):
        model = on_gpu(implementation, indexer_loss_coef=coefficient).train()
        model(ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    actual, expected = found
    assert plans == [True] * 3 and actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() <= 1e-3 * gradient.norm(), name


def greedy(model, ids, **options):
    options = {"disable_compile": True} | options
    out = model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **options)
    return out[:, ids.shape[1] :]


@torch.no_grad()
def by_hand(model, ids):
    """No cache, no early exit."""
    start = ids.shape[1]
    for _ in range(NEW):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[:, start:]


WAYS = {
    "cache": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 100},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("length", [SHORT, LONG])
def test_greedy_tokens_are_the_masked_paths_in_every_way(length, plans):
    ids = prompt(length)
    kernels, expected = on_gpu(NAME), by_hand(on_gpu("sdpa"), ids)
    assert torch.equal(by_hand(kernels, ids), expected), "full passes"
    assert all(plans) and len(plans) == (3 * NEW if length == LONG else 0)  # short: no more keys than k
    for name, way in WAYS.items():
        assert torch.equal(greedy(kernels, ids, **way), expected), name


@pytest.mark.parametrize("way", ["cache", "static cache"])
def test_a_left_padded_batch_gives_each_prompt_its_own_tokens(way):
    model, short, long = on_gpu(NAME), prompt(SHORT, seed=3), prompt(LONG, seed=4)
    batch = torch.zeros(2, LONG, dtype=torch.long, device="cuda")
    batch[0, -SHORT:], batch[1] = short, long
    out = greedy(model, batch, attention_mask=(batch != 0).long(), **WAYS[way])
    masks = on_gpu("sdpa")
    assert torch.equal(out[:1], by_hand(masks, short)) and torch.equal(out[1:], by_hand(masks, long))


@pytest.mark.slow
def test_a_compiled_static_cache_changes_no_token():
    ids = prompt(LONG)
    way = {"cache_implementation": "static", "disable_compile": False}
    assert torch.equal(greedy(on_gpu(NAME), ids, **way), by_hand(on_gpu("sdpa"), ids))
