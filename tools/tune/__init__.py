"""Cases of tools/tune_kernels.py: a kernel, its inputs, and named configurations of it.

Owns what a case is and the list of them.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from tune.kd import DistillationCase
from tune.topk import IndexCase


class Case(Protocol):
    """One kernel at one length.

    Attributes:
        candidates: by name; the first is what the others are checked against.
    """

    candidates: dict

    def draw(self) -> None:
        """Make the inputs."""

    def configured(self, name: str) -> AbstractContextManager:
        """Calls within use this candidate."""

    def call(self) -> object:
        """What is timed."""

    def result(self) -> object:
        """What is checked."""

    def difference(self, result: object, expected: object) -> object:
        """How far a result is from the first candidate's, to print."""


CASES: dict[str, Callable[[int, torch.device], Case]] = {"kd": DistillationCase, "topk": IndexCase}
