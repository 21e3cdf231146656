"""Runs a model on needle samples: its greedy answer, and how much likelier the true values are than others.

Owns generation and scores; prompts are needle.py's. The second figure is for small models, whose greedy
answers are all wrong long before they have stopped using the needle.
"""

import torch

from megatron_clsa.errors import UserError
from megatron_clsa.evaluate.load import Subject
from megatron_clsa.evaluate.needle import PUZZLES, Sample, make_sample


def samples(subject: Subject, task: str, length: int, count: int, seed: int) -> list[Sample]:
    """`count` samples of at most `length` tokens with their answer, needles at depths spread evenly."""
    room = length - _answer_room(subject, task, seed)
    made = []
    for i in range(count):
        depth = i / max(1, count - 1)
        sample = make_sample(task, room, depth, f"{seed} {i}", lambda text: len(subject.prompt_ids(text)))
        if sample is None:
            raise UserError(
                f"--lengths {length} is too short for the needles of {task}: give a larger one, "
                "or leave the task out of --tasks"
            )
        made.append(sample)
    return made


def _answer_room(subject: Subject, task: str, seed: int) -> int:
    """Tokens kept free for an answer: what the first sample's needs, and a third more."""
    target = make_sample(task, 1 << 16, 0.0, f"{seed} 0", lambda text: 1 << 16).target
    return len(subject.encode(target)) * 4 // 3 + 2


@torch.no_grad()
def answer(subject: Subject, sample: Sample, room: int) -> str:
    """The greedy continuation of the prompt."""
    ids = torch.tensor([subject.prompt_ids(sample.prompt)], device=subject.model.device)
    tokenizer = subject.tokenizer
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    out = subject.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, do_sample=False, pad_token_id=pad or 0
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def target_loss(subject: Subject, prompt: str, target: str) -> float:
    """Mean loss of the tokens of `target` after `prompt`."""
    start = subject.prompt_ids(prompt)
    end = subject.encode(target)
    ids = torch.tensor([start + end], device=subject.model.device)
    logits = subject.model(ids[:, :-1], logits_to_keep=len(end), use_cache=False).logits[0]
    return torch.nn.functional.cross_entropy(logits[-len(end) :].float(), ids[0, -len(end) :]).item()


def measure(subject: Subject, tasks: list[str], lengths: list[int], count: int, seed: int) -> list[dict]:
    """The needle section of the report: one row a task and length."""
    rows = []
    for length in lengths:
        for task in tasks:
            made = samples(subject, task, length, count, seed)
            room = _answer_room(subject, task, seed)
            scores = [sample.score(answer(subject, sample, room)) for sample in made]
            gains = [
                target_loss(subject, sample.prompt, sample.decoy)
                - target_loss(subject, sample.prompt, sample.target)
                for sample in made
            ]
            rows.append(
                {
                    "task": task,
                    "length": length,
                    "samples": count,
                    "score": sum(scores) / count,
                    "gain_over_decoy": sum(gains) / count,
                }
            )
    return rows


def check_tasks(names: list[str]) -> None:
    if not names:
        raise UserError(f"--needle-tasks is empty: choose from {', '.join(PUZZLES)}")
    for name in names:
        if name not in PUZZLES:
            raise UserError(f"--needle-tasks {name}: no such task; choose from {', '.join(PUZZLES)}")
