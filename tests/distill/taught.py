"""One training step under a dense teacher at any layout of either, for the tests beside it; owns no test."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from layouts import Case, Layout, batches, build, load_weights, save_gradients
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_clsa.distill.teacher import TeacherSpec
from megatron_clsa.training.step import TrainingStep
from megatron_clsa.training.teacher_flags import TeacherSettings
from megatron_clsa.training.teacher_supply import TeacherSupply

VOCABULARY = 61  # of the tokenizer; student and teacher are padded to 64
LAYER_MAP = {2: 1, 5: 2, 8: 3}  # of the self-decoder, of the cross-decoder, the last
TOP_K, TEMPERATURE = 5, 2.0
LM, KL, HIDDEN = 0.5, 0.7, 0.3


@dataclass(frozen=True)
class Taught:
    """A layout of the student, and what the teacher has of its own."""

    student: Layout = field(default_factory=Layout)
    teacher: dict = field(default_factory=dict)


def save_teacher(folder: Path) -> Path:
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        "llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, initializer_range=0.3, max_position_embeddings=64,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def settings(folder: str, **sizes) -> TeacherSettings:
    sizes = {"shards": 1} | sizes
    layers = tuple(LAYER_MAP.values())
    spec = TeacherSpec(
        Path(folder),
        "fp32",
        vocabulary=VOCABULARY,
        top_k=TOP_K,
        temperature=TEMPERATURE,
        layers=layers,
        **sizes,
    )
    return TeacherSettings(spec, KL, LM, HIDDEN, LAYER_MAP)


def taught_step(taught: Taught, case: Case, weights: str, teacher: str, grads: str) -> dict | None:
    """One global batch; saves gradients to `grads`, returns mean losses on last-stage ranks."""
    layout = taught.student
    models = build(layout, case)
    load_weights(models, weights)
    told = settings(teacher, **taught.teacher)
    config = models[0].module.config
    for model in models:
        model.zero_grad_buffer()
        model.train()
    figures = TeacherSupply(told).run_schedule(
        get_forward_backward_func(),
        [list(batches(case)) for _ in models],
        models,
        forward_step_func=TrainingStep(config, None, told),
        seq_length=case.work.seq,
        micro_batch_size=case.work.micro,
        forward_only=False,
    )
    save_gradients(models, grads)
    return _means(figures)


def _means(figures: list[dict]) -> dict | None:
    if not figures:
        return None
    names = sorted(figures[0])
    totals = torch.stack([torch.stack([one[name] for name in names]) for one in figures]).sum(0)
    dist.all_reduce(totals, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return {name: (total / count).item() for name, (total, count) in zip(names, totals, strict=True)}


def taught_steps(taught: Taught, cases: list[Case], weights: str, teacher: str, folder: str) -> dict:
    """`taught_step` for each case, gradients under `folder/<case>`."""
    return {case.name: taught_step(taught, case, weights, teacher, f"{folder}/{case.name}") for case in cases}
