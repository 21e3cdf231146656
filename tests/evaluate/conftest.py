"""Fixtures of this folder: one tiny model folder and one text file a session."""

import pytest
from eval_folder import some_text, write_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "held_out.txt"
    path.write_text(some_text())
    return path
