"""RULER-style needle tasks, generated locally: prompts of a wanted length, their answers, their score.

Owns the wording and the sampling; runs no model (retrieval.py does). Follows RULER (arXiv 2404.06654):
repeated filler sentences as the haystack, the share of the wanted strings that the answer holds as score.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

FILLER = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back.")
ADJECTIVES = ("amber", "brave", "calm", "dusty", "eager", "faint", "gentle", "hollow", "idle", "jolly")
NOUNS = ("anchor", "bridge", "candle", "desert", "engine", "forest", "garden", "harbor", "island")
NEEDLES = 4  # keys, queries or values of the tasks that have several; steps of a variable's chain


@dataclass(frozen=True)
class Sample:
    """One prompt.

    Attributes:
        prompt: haystack with needles, then the question and the beginning of its answer.
        answers: strings that the continuation has to hold.
        target: the continuation that a perfect model would give.
        decoy: the same with other values, which the prompt does not hold.
    """

    prompt: str
    answers: tuple[str, ...]
    target: str
    decoy: str

    def score(self, continuation: str) -> float:
        return sum(answer in continuation for answer in self.answers) / len(self.answers)


@dataclass(frozen=True)
class _Puzzle:
    needles: list[str]
    question: str
    answers: list[str]
    decoys: list[str]


def _numbers(rng: random.Random, count: int) -> list[str]:
    return [str(value) for value in rng.sample(range(10_000, 100_000), count)]


def _keys(rng: random.Random, count: int) -> list[str]:
    return rng.sample([f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS], count)


def _fact(key: str, value: str) -> str:
    return f"One of the special magic numbers for {key} is: {value}."


def _question(keys: str) -> str:
    return (
        f"What are the special magic numbers for {keys} in the text above? "
        f"The special magic numbers for {keys} in the text above are"
    )


def _lookup(rng: random.Random, keys: int, asked: int, values: int) -> _Puzzle:
    """`values` numbers for each of `keys` keys; the first `asked` keys are asked for."""
    names = _keys(rng, keys)
    numbers = _numbers(rng, 2 * keys * values)
    of = {name: numbers[i * values : (i + 1) * values] for i, name in enumerate(names)}
    needles = [_fact(name, value) for name, held in of.items() for value in held]
    rng.shuffle(needles)
    answers = [value for name in names[:asked] for value in of[name]]
    return _Puzzle(needles, _question(" and ".join(names[:asked])), answers, numbers[-len(answers) :])


def _tracking(rng: random.Random) -> _Puzzle:
    """A chain of assignments; asked for are all variables that hold the first value."""
    letters = rng.sample("ABCDEFGHJKLMNPQRSTUVWXYZ", 2 * NEEDLES)
    names = [f"V{letter}{rng.randrange(10, 100)}" for letter in letters]
    chain, decoys = names[:NEEDLES], names[NEEDLES:]
    value = _numbers(rng, 1)[0]
    needles = [f"VAR {chain[0]} = {value}."]
    needles += [f"VAR {new} = VAR {old}." for old, new in pairwise(chain)]
    question = (
        f"Find all variables that are assigned the value {value} in the text above. "
        f"The variables that are assigned the value {value} are"
    )
    return _Puzzle(needles, question, chain, decoys)


PUZZLES: dict[str, Callable[[random.Random], _Puzzle]] = {
    "single": lambda rng: _lookup(rng, 1, 1, 1),
    "multi_key": lambda rng: _lookup(rng, NEEDLES, 1, 1),
    "multi_query": lambda rng: _lookup(rng, NEEDLES, NEEDLES, 1),
    "multi_value": lambda rng: _lookup(rng, 1, 1, NEEDLES),
    "variable_tracking": _tracking,
}


def make_sample(
    task: str, length: int, depth: float, seed: str, count_tokens: Callable[[str], int]
) -> Sample | None:
    """One sample whose prompt has at most `length` tokens, and nearly as many.

    Args:
        task: a key of `PUZZLES`.
        depth: 0..1, where a lone needle stands; several stand in random places, a chain in its order.
        seed: the same seed gives the same needles and places at every length.
    Returns:
        None if not even the needles fit.
    """
    rng = random.Random(f"{task} {seed}")
    puzzle = PUZZLES[task](rng)
    places = [depth] if len(puzzle.needles) == 1 else sorted(rng.random() for _ in puzzle.needles)

    def prompt(fillers: int) -> str:
        lines = [FILLER[i % len(FILLER)] for i in range(fillers)]
        for place, needle in zip(reversed(places), reversed(puzzle.needles), strict=True):
            lines.insert(round(place * fillers), needle)
        return f"{' '.join(lines)}\n{puzzle.question}"

    limit = 2 * length * len(FILLER) // count_tokens(" ".join(FILLER))
    fillers = _most(lambda n: count_tokens(prompt(n)) <= length, limit)
    if fillers < 0:
        return None
    target, decoy = (" " + ", ".join(words) + "." for words in (puzzle.answers, puzzle.decoys))
    return Sample(prompt(fillers), tuple(puzzle.answers), target, decoy)


def _most(fits: Callable[[int], bool], limit: int) -> int:
    """The largest n in 0..limit that fits, -1 if none does; what fits fits with fewer."""
    low, high = -1, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
