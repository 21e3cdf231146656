"""A teacher's targets are its own likeliest tokens, documents kept apart, alone or with shared weights."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_clsa.distill.teacher import Teacher, TeacherSpec
from megatron_clsa.errors import UserError

sys.path.append(str(Path(__file__).resolve().parents[1] / "parallel"))
from ranks import run_ranks

SIZES = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2,
}  # fmt: skip
KINDS = {  # a cap behind the output matrix, every head its own key, biases, one matrix for words in and out
    "gemma2": {"final_logit_softcapping": 2.0},
    "llama": {"num_key_value_heads": 4},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
}
VOCABULARY = 97  # of the tokenizer: the last three are the teacher's padding


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory):
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **(SIZES | KINDS[request.param]))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # else a lost one would not show
                parameter.uniform_(0.5, 1.5)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder, model


def spec(folder, shards: int = 1, temperature: float = 1.0, tp: int = 1, top_k: int = 8) -> TeacherSpec:
    return TeacherSpec(Path(folder), "fp32", shards, VOCABULARY, top_k, temperature, (1, 3), tp)


def packed(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, VOCABULARY, (30,), generator=torch.Generator().manual_seed(seed))
    return tokens, torch.cat([torch.arange(12), torch.arange(18)])


@torch.no_grad()
def test_targets_are_the_models_likeliest_tokens_of_each_document(model):
    folder, own = model
    tokens, positions = packed()
    ids, log_probs, states = Teacher(spec(folder, temperature=2.0), "cpu").targets(tokens, positions)
    for rows in (slice(0, 12), slice(12, 30)):
        logits = own(tokens[None, rows]).logits[0, :, :VOCABULARY] / 2.0
        best = logits.log_softmax(-1).topk(8, dim=-1)
        assert torch.equal(ids[rows].long(), best.indices)
        torch.testing.assert_close(log_probs[rows], best.values, rtol=1e-5, atol=1e-5)
        hidden = own(tokens[None, rows], output_hidden_states=True).hidden_states
        torch.testing.assert_close(states[rows, 0], hidden[1][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "cohere", "granite", "mixtral"])
def test_other_families_give_their_own_logits(kind, tmp_path):
    """Scales behind the output matrix, experts, layers of another name."""
    extra = {"logit_scale": 0.3, "logits_scaling": 4.0, "num_local_experts": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    own = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | extra))).eval()
    own.save_pretrained(tmp_path)
    tokens, positions = packed()
    ids, log_probs, _ = Teacher(spec(tmp_path), "cpu").targets(tokens, positions)
    with torch.no_grad():
        second = own(tokens[None, 12:]).logits[0, :, :VOCABULARY].log_softmax(-1)
    torch.testing.assert_close(log_probs[12:], second.gather(1, ids[12:].long()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["bloom", "falcon"])
def test_a_family_that_mixes_documents_is_refused(kind, tmp_path):
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{kind} lets a document see the one before it"):
        Teacher(spec(tmp_path), "cpu")


def _on_ranks(folder: str, out: str):
    rank = torch.distributed.get_rank()
    teacher = Teacher(spec(folder, shards=2), "cpu")
    part = teacher.trunk.layers[0].mlp.up_proj.weight.to_local().numel()
    torch.save((teacher.targets(*packed(rank)), part), f"{out}/{rank}.pt")


def test_ranks_that_share_the_weights_give_their_own_sequences_targets(model, tmp_path):
    folder, own = model
    run_ranks(2, _on_ranks, str(folder), str(tmp_path))
    alone = Teacher(spec(folder), "cpu")
    for rank in range(2):
        targets, part = torch.load(tmp_path / f"{rank}.pt")
        assert part * 2 == own.base_model.layers[0].mlp.up_proj.weight.numel()
        for mine, expected in zip(targets, alone.targets(*packed(rank)), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


def _on_split_ranks(folder: str, out: str, top_k: int):
    rank = torch.distributed.get_rank()
    teacher = Teacher(spec(folder, tp=2, top_k=top_k), "cpu")
    heads = teacher.trunk.layers[0].self_attn.q_proj.weight.to_local().shape
    words = teacher.model.lm_head.weight.to_local().shape
    torch.save((teacher.targets(*packed(rank)), heads, words), f"{out}/{rank}.pt")


@pytest.mark.parametrize("top_k", [8, 60, VOCABULARY])
def test_tensor_parallel_ranks_find_the_exact_likeliest_tokens_and_whole_states(model, tmp_path, top_k):
    """Sixty tokens are more than one shard of fifty holds; the second shard ends in padding."""
    folder, _ = model
    run_ranks(2, _on_split_ranks, str(folder), str(tmp_path), top_k)
    alone = Teacher(spec(folder, top_k=top_k), "cpu")
    for rank in range(2):
        (ids, log_probs, states), heads, words = torch.load(tmp_path / f"{rank}.pt")
        assert (heads, words) == ((16, 32), (50, 32))
        expected_ids, expected, expected_states = alone.targets(*packed(rank))
        assert torch.equal(ids, expected_ids)
        torch.testing.assert_close(log_probs, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(states, expected_states, rtol=1e-5, atol=3e-5)
