"""Holds the pages to the tree: every link, path and test that README.md or docs/ names is there.

Reads sources only. What a page says of a figure is held elsewhere (docs/results, docs/recipes.md).
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.exists()]
FOLDERS = "examples|tools|tests|slurm|docs|kernels|megatron_clsa"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    local = {target.partition("#")[0] for target in targets if not re.match(r"https?:|#", target)}
    assert not [name for name in sorted(local) if not (page.parent / name).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_that_a_page_names_exist(page):
    named = set(re.findall(rf"(?<![\w/.*-])(?:{FOLDERS})/[\w./-]*\w", page.read_text()))
    assert not [name for name in sorted(named) if not (ROOT / name).exists() and not _is_made(name)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_source_files_that_a_page_names_exist(page):
    """`model/decoder.py` is short for the package's."""
    homes = (ROOT, ROOT / "megatron_clsa", ROOT / "tests")
    named = set(re.findall(r"`((?:\w+/)+\w+\.(?:py|sh))`", page.read_text()))
    assert not [name for name in sorted(named) if not any((home / name).exists() for home in homes)]


def _is_made(name: str) -> bool:
    """`slurm/site.env` is the user's own copy of the example beside it."""
    return (ROOT / f"{name}.example").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_a_page_names_exist(page):
    """`file.py::test_name`, or `::test_name` of the file named before it; `...` stands for the rest."""
    file, missing = None, []
    for found, name in re.findall(r"`([\w/]*\.py)?::(test_\w+)", page.read_text()):
        file = found or file
        tests = "".join(path.read_text() for path in (ROOT / "tests").rglob(Path(file).name))
        if not re.search(rf"def {name}", tests):
            missing.append(f"{file}::{name}")
    assert not missing


def test_readme_links_every_page():
    """A page that nothing leads to is read by nobody."""
    linked = "".join(page.read_text() for page in PAGES)
    pages = [page.name for page in PAGES if page.name != "README.md"]
    assert not [name for name in pages if f"({name}" not in linked and f"docs/{name}" not in linked]


def test_commands_of_the_readme_are_run_by_ci_or_say_why_not():
    """`.ci/run` runs what is fenced as `bash cpu`, and the tests."""
    blocks = re.findall(r"```bash( cpu)?\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    elsewhere = [line for run, block in blocks if not run for line in block.splitlines() if line.strip()]
    marks = ("# GPU", "# not in CI", "as .ci/run does")
    assert any(run for run, _ in blocks)
    assert not [line for line in elsewhere if not any(mark in line for mark in marks)]
