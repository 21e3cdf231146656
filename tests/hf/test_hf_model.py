"""The Hugging Face model equals the folder's contract written out row by row, and itself in every mode.

Owns logits and gradients; generation is in test_hf_generate.py, folders in test_hf_folder.py.
"""

import pytest
import torch
from hf_naive import Naive
from hf_tiny import LONG, TOPK, WINDOW, tiny_config, tiny_model, tokens
from transformers import DynamicCache, StaticCache

from megatron_clsa.hf.attention_clsa import _largest

VARIANTS = [
    {},
    {"cross_qk_norm": True, "index_qk_norm": True},
    {"use_qk_norm": False, "tie_word_embeddings": True},
    {"num_key_value_heads": 4, "num_self_decoder_layers": 3},
    {"cross_attention": "dense"},
    {"num_hidden_layers": 2, "num_self_decoder_layers": 1, "head_dim": 32},
]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("changes", VARIANTS)
def test_logits_equal_the_contract_row_by_row(changes, implementation):
    model = tiny_model(dtype=torch.float64, **changes)
    model.set_attn_implementation(implementation)
    ids = tokens(LONG)
    expected = Naive(model.config, model.state_dict()).logits(ids[0])
    torch.testing.assert_close(model(ids).logits[0], expected, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("length", [200, WINDOW, 1])
def test_blocked_window_equals_the_full_mask(length):
    model = tiny_model(dtype=torch.float64, sliding_window=WINDOW)
    ids = tokens(length, batch=2)
    blocked = model(ids).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(blocked, model(ids).logits, rtol=0, atol=1e-5)


def test_equal_scores_go_to_the_smaller_position():
    score = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 5.0, 2.0]])
    assert _largest(score, 4).nonzero()[:, 1].tolist() == [0, 2, 3, 5]


@torch.no_grad()
def test_equal_indexer_keys_select_the_first_k_positions():
    model = tiny_model(dtype=torch.float64)
    model.model.memory.indexer.k_proj.weight.zero_()
    ids = tokens(LONG)
    naive = Naive(model.config, model.state_dict())
    expected = naive.logits(ids[0])
    assert naive.selected[-1].tolist() == list(range(TOPK))
    torch.testing.assert_close(model(ids).logits[0], expected, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("keep", [1, 5, LONG, 1000])
def test_early_exit_changes_no_kept_logit(keep):
    model, ids = tiny_model(), tokens(LONG, batch=2)
    full = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, full[:, -keep:], rtol=0, atol=1e-5)


@torch.no_grad()
def test_early_exit_runs_the_cross_decoder_for_kept_rows_only():
    model, ids = tiny_model(), tokens(LONG)
    seen = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _, args, out: seen.append(out.shape[1]))
    model(ids, logits_to_keep=1)
    assert seen == [LONG] * 2 + [1] * 3


def test_labels_and_index_tensors_get_every_row():
    model, ids = tiny_model(), tokens(LONG)
    assert model(ids, labels=ids, logits_to_keep=1).loss.isfinite()
    rows = torch.tensor([3, 30])
    torch.testing.assert_close(model(ids, logits_to_keep=rows).logits, model(ids).logits[:, rows])


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 7, 20])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_cached_chunks_equal_one_pass(kind, chunk, implementation):
    model, ids = tiny_model(), tokens(LONG, batch=2)
    model.set_attn_implementation(implementation)
    full = model(ids).logits
    config = model.config
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=64)
    parts = [model(part, past_key_values=cache).logits for part in ids.split(chunk, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=5e-5)


@torch.no_grad()
def test_the_cache_holds_one_memory():
    model = tiny_model()
    cache = model(tokens(LONG), use_cache=True).past_key_values
    names = [type(layer).__name__ for layer in cache.layers]
    assert names == ["DynamicSlidingWindowLayer"] * 2 + ["DynamicIndexedLayer"]
    assert [layer.keys.shape[2] for layer in cache.layers] == [WINDOW - 1, WINDOW - 1, LONG]


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_left_padding_changes_no_logit(implementation):
    model, ids = tiny_model(), tokens(LONG, batch=2)
    model.set_attn_implementation(implementation)
    pad = torch.tensor([[0] * 9])
    padded = torch.stack([torch.cat([pad[0], ids[0]]), torch.cat([ids[1, :9], ids[1]])])
    mask = torch.ones_like(padded)
    mask[0, :9] = 0
    logits = model(padded, attention_mask=mask).logits
    torch.testing.assert_close(logits[0, 9:], model(ids[:1]).logits[0], rtol=0, atol=5e-5)
    torch.testing.assert_close(logits[1], model(padded[1:]).logits[0], rtol=0, atol=5e-5)


@torch.no_grad()
def test_packed_documents_do_not_see_each_other():
    model, ids = tiny_model(), tokens(LONG + 20, batch=1)
    positions = torch.cat([torch.arange(20), torch.arange(LONG)])[None]
    packed = model(ids, position_ids=positions).logits
    torch.testing.assert_close(packed[:, 20:], model(ids[:, 20:]).logits, rtol=0, atol=5e-5)


def gradients(model, ids) -> dict:
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("coefficient", [0.0, 0.1])
def test_gradient_checkpointing_changes_no_gradient(reentrant, coefficient):
    model, ids = tiny_model(indexer_loss_coef=coefficient).train(), tokens(LONG, batch=2)
    plain = gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    checkpointed = gradients(model, ids)
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=1e-4, atol=1e-5)


def test_the_indexer_is_trained_only_when_asked():
    ids = tokens(LONG)
    without = gradients(tiny_model(), ids)
    with_loss = gradients(tiny_model(indexer_loss_coef=0.1), ids)
    only = {name for name in with_loss if name not in without}
    assert only == {f"model.memory.indexer.{n}_proj.weight" for n in "qk"}


def test_training_the_indexer_alone_lowers_its_loss_and_moves_nothing_else():
    model, ids = tiny_model(indexer_loss_coef=1.0, cross_attention="dense").train(), tokens(LONG, batch=4)
    indexer = model.model.memory.indexer.requires_grad_(True)
    before = {name: p.clone() for name, p in model.named_parameters() if "indexer" not in name}
    optimizer = torch.optim.Adam(indexer.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        out = model(ids, labels=ids)
        out.loss.backward()
        optimizer.step()
        losses.append(out.indexer_loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


@torch.no_grad()
def test_losses_of_the_parts_of_a_batch_add_up_to_its_own():
    model, ids = tiny_model(indexer_loss_coef=0.5), tokens(LONG, batch=4)
    items = 4 * (LONG - 1)
    parts = [model(part, labels=part, num_items_in_batch=items).loss for part in ids.split(2)]
    assert sum(parts).item() == pytest.approx(model(ids, labels=ids).loss.item(), abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_neither_loss(side):
    model, ids = tiny_model(indexer_loss_coef=0.5), tokens(LONG)
    plain = model(ids, labels=ids)
    pads = (9, 0) if side == "left" else (0, 9)
    mask = torch.nn.functional.pad(torch.ones_like(ids), pads)
    labels = torch.nn.functional.pad(ids, pads, value=-100)
    labels[mask.cumsum(-1) == 1] = -100  # in the unpadded row, nobody predicts the first token
    padded = model(torch.nn.functional.pad(ids, pads), attention_mask=mask, labels=labels)
    assert padded.indexer_loss.item() == pytest.approx(plain.indexer_loss.item(), abs=1e-4)
    assert padded.loss.item() == pytest.approx(plain.loss.item(), abs=1e-4)


@pytest.mark.parametrize("changes", [{}, {"cross_attention": "dense"}])
def test_indexer_loss_equals_the_contract_row_by_row(changes):
    model, ids = tiny_model(dtype=torch.float64, indexer_loss_coef=0.1, **changes), tokens(LONG)
    naive = Naive(model.config, model.state_dict())
    naive.logits(ids[0])
    assert model(ids, labels=ids).indexer_loss.item() == pytest.approx(naive.index_loss.item(), abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "megatron_clsa"])
def test_a_row_of_padding_alone_disturbs_no_other(implementation):
    model, ids = tiny_model(), tokens(LONG, batch=2)
    model.set_attn_implementation(implementation)
    mask = torch.ones_like(ids)
    mask[0] = 0
    logits = model(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[1:], model(ids[1:]).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("length", "keep"), [(0, 0), (3, -1)])
def test_nothing_to_compute_is_refused(length, keep):
    with pytest.raises(ValueError, match=f"{length} tokens, logits_to_keep {keep}"):
        tiny_model()(tokens(3)[:, :length], logits_to_keep=keep)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_self_decoder_layers": 5},
        {"num_attention_heads": 3},
        {"cross_attention": "some"},
        {"sliding_window": 0},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
    ],
)
def test_config_refuses(changes):
    with pytest.raises(Exception, match=next(iter(changes))):
        tiny_config(**changes)
