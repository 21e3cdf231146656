"""Greedy generation is the same token for token however it is run.

Owns nothing about logits (test_hf_model.py). Prompts are shorter and longer than window and k.
"""

import pytest
import torch
from hf_tiny import LONG, tiny_model, tokens

NEW = 24  # enough to cross window and k from the short prompt
MODES = {
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 7},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


def greedy(model, ids, **options):
    out = model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **options)
    return out[:, ids.shape[1] :]


@torch.no_grad()
def by_hand(model, ids):
    """No cache, no early exit: the whole sequence again for every token."""
    start = ids.shape[1]
    for _ in range(NEW):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[:, start:]


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    model = tiny_model()
    model.set_attn_implementation(request.param)
    return model


@pytest.mark.parametrize("length", [1, 3, LONG])
def test_cache_and_early_exit_change_no_token(model, length):
    ids = tokens(length, batch=2)
    assert torch.equal(greedy(model, ids), by_hand(model, ids))
    assert torch.equal(greedy(model, ids, use_cache=False), by_hand(model, ids))


@pytest.mark.parametrize("length", [3, LONG])
@pytest.mark.parametrize("mode", MODES)
def test_every_way_to_generate_gives_the_greedy_tokens(model, mode, length):
    ids = tokens(length)
    assert torch.equal(greedy(model, ids, **MODES[mode]), by_hand(model, ids))


@pytest.mark.parametrize("length", [3, LONG])
def test_an_assistant_changes_no_token(model, length):
    ids = tokens(length)
    assistant = tiny_model(seed=5, num_hidden_layers=2, num_self_decoder_layers=1)
    assert torch.equal(greedy(model, ids, assistant_model=assistant), by_hand(model, ids))


@pytest.mark.parametrize("mode", [{}, MODES["static cache"]])
def test_a_left_padded_batch_gives_each_prompt_its_own_tokens(model, mode):
    short, long = tokens(5, seed=3), tokens(LONG, seed=4)
    batch = torch.zeros(2, LONG, dtype=torch.long)
    batch[0, -5:], batch[1] = short, long
    out = greedy(model, batch, attention_mask=(batch != 0).long(), **mode)
    assert torch.equal(out[:1], by_hand(model, short))
    assert torch.equal(out[1:], by_hand(model, long))


def test_beam_search_scores_what_the_full_pass_scores(model):
    ids = tokens(LONG)
    out = model.generate(
        ids, max_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=0, output_scores=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    with torch.no_grad():
        logits = model(out.sequences[:, :-1]).logits[0, LONG - 1 :].log_softmax(-1)
    picked = logits.gather(-1, out.sequences[0, LONG:, None]).sum().item()
    new_tokens = out.sequences.shape[1] - LONG
    assert out.sequences_scores[0].item() == pytest.approx(picked / new_tokens, abs=1e-4)


@pytest.mark.parametrize("mode", [{"use_cache": False}, MODES["static cache"]])
def test_beam_search_gives_the_same_tokens_without_and_with_any_cache(mode):
    model, ids = tiny_model(), tokens(LONG, batch=2)
    assert torch.equal(greedy(model, ids, num_beams=3, **mode), greedy(model, ids, num_beams=3))


def test_beams_of_a_left_padded_batch_are_each_prompts_own():
    model, short, long = tiny_model(), tokens(5, seed=3), tokens(LONG, seed=4)
    batch = torch.zeros(2, LONG, dtype=torch.long)
    batch[0, -5:], batch[1] = short, long
    out = greedy(model, batch, attention_mask=(batch != 0).long(), num_beams=3)
    assert torch.equal(out[:1], greedy(model, short, num_beams=3))
    assert torch.equal(out[1:], greedy(model, long, num_beams=3))


def test_the_model_itself_or_its_dense_twin_as_assistant_changes_no_token():
    model, ids = tiny_model(), tokens(LONG)
    for assistant in (tiny_model(), tiny_model(cross_attention="dense")):
        assert torch.equal(greedy(model, ids, assistant_model=assistant), by_hand(model, ids))


def test_unsupported_caches_refuse_clearly():
    with pytest.raises((ValueError, ImportError)):
        greedy(tiny_model(), tokens(LONG), cache_implementation="quantized")
