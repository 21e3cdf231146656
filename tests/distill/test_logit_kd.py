"""The teacher's losses equal their meaning written out: full KL, its coarse form, tensor-parallel shards.

Needs no Megatron model; gloo ranks stand for tensor parallelism.
"""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_clsa.distill.hidden_match import normalised_distance
from megatron_clsa.distill.logit_kd import TeacherTargets, teacher_kl

sys.path.append(str(Path(__file__).resolve().parents[1] / "parallel"))
from ranks import run_ranks

S, B, V = 7, 2, 40


class Alone:
    """A process group of one."""

    def size(self):
        return 1

    def rank(self):
        return 0


def logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(S, B, V, generator=torch.Generator().manual_seed(seed))


def targets_of(teacher: torch.Tensor, k: int, temperature: float) -> TeacherTargets:
    best = (teacher / temperature).log_softmax(-1).topk(k, dim=-1)
    ids, values = best.indices.transpose(0, 1).to(torch.int32), best.values.transpose(0, 1)
    return TeacherTargets(ids, values, temperature)


def full_kl(teacher, student, temperature) -> torch.Tensor:
    p, q = ((x / temperature).log_softmax(-1) for x in (teacher, student))
    return (p.exp() * (p - q)).sum(-1).transpose(0, 1)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_with_every_token_kept_it_is_the_full_kl(temperature):
    teacher, student = logits(0), logits(1)
    mine, plain = student.clone().requires_grad_(), student.clone().requires_grad_()
    kl = teacher_kl(mine, targets_of(teacher, V, temperature), Alone())
    expected = full_kl(teacher, plain, temperature)
    torch.testing.assert_close(kl, expected, rtol=0, atol=2e-5)
    weights = torch.rand(B, S, generator=torch.Generator().manual_seed(2))
    (kl * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(mine.grad, plain.grad, rtol=0, atol=2e-5)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_the_rest_is_one_outcome(k):
    teacher, student = logits(0), logits(1)
    targets = targets_of(teacher, k, 1.0)
    ids = targets.ids.long().transpose(0, 1)
    p, q = (torch.softmax(x.double(), -1) for x in (teacher, student))

    def merge(x):
        kept = x.gather(-1, ids)
        return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1)

    p, q = merge(p), merge(q)
    expected = (p * (p / q).log()).sum(-1).transpose(0, 1)
    kl = teacher_kl(student, targets, Alone())
    torch.testing.assert_close(kl.double(), expected, rtol=0, atol=2e-5)
    assert (kl >= -1e-6).all() and (kl <= full_kl(teacher, student, 1.0) + 1e-5).all()


def test_it_is_zero_with_no_gradient_only_where_the_student_agrees():
    teacher = logits(0)
    student = (teacher + 1.7).requires_grad_()
    kl = teacher_kl(student, targets_of(teacher, 5, 1.0), Alone())
    kl.sum().backward()
    assert kl.abs().max() < 1e-5 and student.grad.abs().max() < 1e-5


def _on_ranks(out: str):
    group = dist.group.WORLD
    student = logits(1).chunk(group.size(), dim=-1)[group.rank()].clone().requires_grad_()
    kl = teacher_kl(student, targets_of(logits(0), 5, 2.0), group)
    (kl * torch.arange(S)).sum().backward()
    torch.save((kl.detach(), student.grad), f"{out}/{group.rank()}.pt")


def test_vocabulary_shards_give_the_same_loss_and_gradient(tmp_path):
    run_ranks(2, _on_ranks, str(tmp_path))
    student = logits(1).requires_grad_()
    kl = teacher_kl(student, targets_of(logits(0), 5, 2.0), Alone())
    (kl * torch.arange(S)).sum().backward()
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for part, _ in parts:
        torch.testing.assert_close(part, kl.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat([grad for _, grad in parts], -1), student.grad, rtol=0, atol=1e-5)


def test_hidden_states_are_compared_by_direction():
    x = torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(0))
    assert normalised_distance(x, 5 * x).max() < 1e-5
    torch.testing.assert_close(normalised_distance(x, -x), torch.full((4, 3), 4.0), rtol=0, atol=1e-4)
