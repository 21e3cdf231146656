"""Holds the tree to its table: who may import whom, file sizes, words that promise work, README commands.

Reads sources only; imports nothing of the package.
"""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES = 450

# A package may import itself and what is named here; a name stands for megatron_clsa.<name>.
SHARED = {"errors", "config"}
MODEL_LAYER = {"model", "distill", "data", "convert", "inference", "estimate"}
ALLOWED = {
    "kernels": set(),
    "hf": {"kernels", "hf"},
    "evaluate": {"evaluate", "convert", "hf", "kernels"} | SHARED,
    "finetune": {"finetune", "convert", "hf", "kernels"} | SHARED,
    "parallel": {"parallel", "kernels"} | SHARED,
    "config": SHARED | {"parallel"},
    "errors": set(),
    **{name: MODEL_LAYER | {"parallel", "kernels", "hf"} | SHARED for name in MODEL_LAYER},
    "training": MODEL_LAYER | {"training", "parallel", "kernels", "hf"} | SHARED,
}


def _tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: cannot tell the project's files from others")
    paths = [ROOT / name for name in listed.stdout.splitlines()]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def _package_of(path: Path) -> str | None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "kernels":
        return "kernels"
    return parts[1] if parts[0] == "megatron_clsa" and len(parts) > 1 else None


def _imported(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, relative ones resolved."""
    own = list(path.relative_to(ROOT).parent.parts)
    own = ["megatron_clsa", *own] if own[0] == "kernels" else own
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = own[: len(own) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def test_imports_go_one_way():
    broken = []
    for path in _tracked("megatron_clsa/*.py", "kernels/*.py"):
        package = _package_of(path)
        for name in _imported(path) if package in ALLOWED else ():
            parts = name.split(".")
            top = parts[1] if parts[0] == "megatron_clsa" and len(parts) > 1 else None
            if top in ALLOWED and top != package and top not in ALLOWED[package]:
                broken.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not broken


def test_nothing_in_the_package_imports_scripts_or_tests():
    for path in _tracked("megatron_clsa/*.py", "kernels/*.py"):
        assert not {name.split(".")[0] for name in _imported(path)} & {
            "examples",
            "tools",
            "tests",
            "kernels",
        }, path


def test_kernels_import_neither_megatron_nor_transformers():
    for path in _tracked("kernels/*.py"):
        assert not {name.split(".")[0] for name in _imported(path)} & {"megatron", "transformers"}, path


def test_kernels_is_no_package_of_its_own():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "megatron_clsa" / "kernels").is_symlink()


def test_files_stay_readable():
    long = {p.name: n for p in _tracked("*.py") if (n := len(p.read_text().splitlines())) > MAX_LINES}
    assert not long


def test_no_word_promises_work_for_later():
    words = re.compile("|".join(("TO" + "DO", "FIX" + "ME", "X" * 3)))
    assert not [p for p in _tracked("*.py", "*.sh", "*.md") if words.search(p.read_text())]


def test_the_scripts_that_the_readme_names_exist():
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("no README in this checkout")
    blocks = re.findall(r"```bash.*?\n(.*?)```", readme.read_text(), re.S)
    named = set(re.findall(r"\b(?:tools|examples|slurm|tests)/[\w./-]+\.(?:py|sh|yaml)", "\n".join(blocks)))
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


def test_every_script_refuses_a_bad_flag_in_one_line():
    """argparse itself prints its usage first."""
    scripts = _tracked("tools/*.py", "examples/*.py", "megatron_clsa/*.py")
    own = [path.name for path in scripts if "argparse.ArgumentParser(" in path.read_text()]
    assert not own
