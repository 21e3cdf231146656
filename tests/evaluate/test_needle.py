"""Needle prompts have the wanted length, hold each answer and no decoy, and are the same for the same seed.

Runs no model.
"""

import pytest

from megatron_clsa.evaluate.needle import NEEDLES, PUZZLES, make_sample

COUNTS = {"single": 1, "multi_key": 1, "multi_query": NEEDLES, "multi_value": NEEDLES}


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("task", PUZZLES)
@pytest.mark.parametrize("length", [150, 997])
def test_a_prompt_nearly_fills_its_length(task, length):
    prompt = make_sample(task, length, 0.5, "0", words).prompt
    assert length - 5 <= words(prompt) <= length


@pytest.mark.parametrize("task", PUZZLES)
def test_a_prompt_holds_every_answer_and_no_decoy(task):
    for seed in range(20):
        sample = make_sample(task, 300, 0.5, str(seed), words)
        assert len(sample.answers) == COUNTS.get(task, NEEDLES)
        assert all(answer in sample.prompt for answer in sample.answers)
        assert not any(decoy in sample.prompt for decoy in sample.decoy.strip(" .").split(", "))


@pytest.mark.parametrize("task", PUZZLES)
def test_the_target_scores_one_and_the_decoy_nothing(task):
    sample = make_sample(task, 300, 0.5, "3", words)
    assert sample.score(sample.target) == 1 and sample.score(sample.decoy) == 0


def test_half_of_the_answers_score_a_half():
    sample = make_sample("multi_value", 300, 0.5, "3", words)
    assert sample.score(" and ".join(sample.answers[: NEEDLES // 2])) == 0.5


def test_a_lone_needle_stands_at_its_depth():
    for depth in (0.0, 0.5, 1.0):
        sample = make_sample("single", 500, depth, "1", words)
        haystack = sample.prompt.split("\n")[0]
        place = haystack.index(sample.answers[0]) / len(haystack)
        assert place == pytest.approx(depth, abs=0.05)


def test_variables_are_assigned_in_the_order_of_their_chain():
    sample = make_sample("variable_tracking", 500, 0.5, "1", words)
    places = [sample.prompt.index(f"VAR {name} =") for name in sample.answers]
    assert places == sorted(places)


def test_the_seed_decides_the_sample_and_the_length_only_the_haystack():
    one, longer = (make_sample("multi_key", n, 0.5, "7", words) for n in (200, 400))
    assert one.answers == longer.answers and one.target == longer.target
    assert one != make_sample("multi_key", 200, 0.5, "8", words)


def test_needles_that_do_not_fit_give_no_sample():
    assert make_sample("multi_value", 20, 0.5, "0", words) is None
