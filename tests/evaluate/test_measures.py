"""Loss by position and the index figures equal what the plain model says of the same tokens."""

import pytest
import torch
from eval_folder import TOPK, WINDOW, some_text

from megatron_clsa.evaluate import index, perplexity, retrieval
from megatron_clsa.evaluate.load import open_folder

LENGTH = 100


@pytest.fixture(scope="module")
def subject(folder):
    return open_folder(folder, "fp32", "cpu")


@pytest.fixture(scope="module")
def ids(subject):
    return perplexity.sequences(subject, [some_text()], LENGTH, 3)


@torch.no_grad()
def test_loss_equals_the_models_own(subject, ids):
    report = perplexity.measure(subject, [some_text()], LENGTH, 3)
    logits = subject.model(ids[:, :-1]).logits
    own = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert report["loss"] == pytest.approx(own.item(), abs=1e-5)
    total = sum(bucket["loss"] * bucket["tokens"] for bucket in report["by_position"])
    assert total / ids[:, 1:].numel() == pytest.approx(own.item(), abs=1e-5)


def test_buckets_cover_every_position_once_and_break_at_window_and_k():
    losses = torch.arange(float(LENGTH)).expand(2, -1)
    buckets = perplexity.by_position(losses, [WINDOW, TOPK])
    covered = [p for bucket in buckets for p in range(bucket.first, bucket.last + 1)]
    assert covered == list(range(1, LENGTH + 1))
    assert {WINDOW + 1, TOPK + 1} <= {bucket.first for bucket in buckets}
    assert buckets[0].loss == 0.0 and buckets[-1].last == LENGTH


def test_no_bucket_but_the_first_is_a_single_position():
    edges = perplexity.bucket_edges(256, [32, 64])
    assert edges == [1, 2, 4, 8, 16, 33, 65, 128]


def test_documents_are_joined_by_the_end_token(subject):
    ids = perplexity.sequences(subject, ["ab", "cd"], 4, 1)[0].tolist()
    assert ids == [*subject.encode("ab"), 0, *subject.encode("cd")]


@torch.no_grad()
def test_coverage_is_the_dense_attention_on_what_the_sparse_model_reads(subject, ids):
    model, row = subject.model, ids[0, :-1]
    figures, _ = index.probe(model.model, row, 9)
    rows = index.sampled_rows(LENGTH, TOPK, 9)
    model.set_attn_implementation("eager")
    sparse = model(row[None], output_attentions=True).attentions[2:]
    model.config.cross_attention = "dense"
    dense = model(row[None], output_attentions=True).attentions[2:]
    model.config.cross_attention = "sparse"
    model.set_attn_implementation("sdpa")
    for i in range(2):
        mass, chosen = dense[i][0, :, rows].mean(0), sparse[0][0, :, rows].sum(0) > 0
        best = mass.topk(TOPK, dim=-1)
        torch.testing.assert_close(figures["coverage"][i], (mass * chosen).sum(-1), rtol=0, atol=1e-5)
        torch.testing.assert_close(figures["oracle_coverage"][i], best.values.sum(-1), rtol=0, atol=1e-5)
        overlap = chosen.gather(-1, best.indices).float().mean(-1)
        torch.testing.assert_close(figures["overlap"][i], overlap)


def test_the_probe_leaves_the_model_as_it_was(subject, ids):
    def state() -> tuple:
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in subject.model.modules()]
        return subject.model.config.cross_attention, hooks

    index.probe(subject.model.model, ids[0, :-1], 3)
    before = state()
    index.probe(subject.model.model, ids[0, :-1], 3)
    assert state() == before


def test_an_index_that_agrees_with_a_layer_overlaps_fully():
    visible = torch.arange(30) <= torch.tensor([[20], [29]])
    score = torch.rand(2, 30)
    assert torch.equal(index.top_mask(score, visible, 5), index.top_mask(3 * score + 1, visible, 5))
    assert index.top_mask(torch.ones(2, 30), visible, 5)[:, :5].all()


def test_a_prompt_and_its_answer_fit_the_length(subject):
    for task in ("single", "multi_value"):
        for sample in retrieval.samples(subject, task, 600, 2, 0):
            prompt = subject.prompt_ids(sample.prompt)
            assert 600 - 60 < len(prompt) < len(prompt) + len(subject.encode(sample.target)) <= 600


def test_target_loss_is_the_mean_loss_of_the_answer(subject):
    start, end = subject.prompt_ids("some prompt"), subject.encode(" 123.")
    both = torch.tensor([start + end])
    labels = both.clone()
    labels[:, : len(start)] = -100
    own = subject.model(both, labels=labels).loss.item()
    assert retrieval.target_loss(subject, "some prompt", " 123.") == pytest.approx(own, abs=1e-5)
