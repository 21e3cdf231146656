"""Llama, Mistral, Qwen2 and Qwen3 with random weights become CLSA models under themselves as teachers.

Two steps of each phase, export with its verification, reload, generate. Without a teacher, on more ranks and
by the commands as users type them: test_init_from.py.
"""

import json
import math

import pytest
from dense_path import PHASES, walk

FAMILIES, HEADS = ("llama", "mistral", "qwen2", "qwen3"), 4
QUICK = {("llama", 4, True), ("mistral", 2, False), ("qwen2", 4, False), ("qwen3", 2, True)}
CASES = [(family, groups, tied) for family in FAMILIES for groups in (2, HEADS) for tied in (False, True)]


def _name(family: str, groups: int, tied: bool) -> str:
    return f"{family}-{'mha' if groups == HEADS else 'gqa'}-{'tied' if tied else 'untied'}"


@pytest.mark.parametrize(
    ("family", "groups", "tied"),
    [pytest.param(*case, id=_name(*case), marks=() if case in QUICK else pytest.mark.slow) for case in CASES],
)
def test_from_a_dense_model_to_text_under_it_as_teacher(tmp_path, family, groups, tied):
    assert walk(tmp_path, family, groups, tied) == 5
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for phase in (phase["name"] for phase in PHASES):
        own = [line for line in lines if line["phase"] == phase]
        steps = [line for line in own if "lm_loss" in line]
        measured = [line["valid_teacher_kl"] for line in own if "valid_teacher_kl" in line]
        assert len(steps) == 2 and all(math.isfinite(line["lm_loss"]) for line in steps)
        assert [("teacher_kl" in line, "hidden_loss" in line) for line in steps] == [
            (phase != "warmup", phase == "heal")
        ] * 2
        assert len(measured) == (0 if phase == "warmup" else 2)
        assert all(math.isfinite(kl) and kl > 0 for kl in measured)
        assert phase != "heal" or measured[-1] < measured[0]
