"""Reads a recipe: one YAML file that holds Megatron's flags in sections and a list of phases.

Owns the shape of the file (sections, phases, duplicates) and turns settings into command-line words. Does
not know what any flag means: the parser in arguments.py does.
"""

import argparse
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_clsa.errors import UserError

SECTIONS = (
    "model",
    "data",
    "teacher",
    "parallel",
    "optimizer",
    "schedule",
    "evaluation",
    "checkpoint",
    "logging",
)
PHASE_FIELDS = ("name", "minimum_coverage", "layouts")
Layouts = dict[int, dict[str, Any]]


@dataclass(frozen=True)
class Phase:
    """One run of the training loop.

    Attributes:
        number: 1-based place in the recipe; names the checkpoint folder.
        name: unique in the recipe, chosen by `--phases`.
        settings: flags of this phase alone; they override the recipe's.
        layouts: flags by number of ranks; those of the largest number that a run reaches override `settings`.
        minimum_coverage: the phase is entered only if the last measured attention coverage, divided by the
            oracle's, is at least this. None enters without asking.
    """

    number: int
    name: str
    settings: dict[str, Any]
    layouts: Layouts
    minimum_coverage: float | None

    @property
    def folder(self) -> str:
        return f"{self.number:02d}_{self.name}"


@dataclass(frozen=True)
class Recipe:
    """A parsed recipe. `settings` joins all sections: keys are flag names with underscores.

    `layouts` holds flags by number of ranks: parallel sizes, recompute. As in a phase, they hold from that
    number on, up to the next one, and override `settings`.
    """

    path: Path
    settings: dict[str, Any]
    layouts: Layouts
    phases: tuple[Phase, ...]

    def settings_for(self, phase: Phase, ranks: int) -> list[dict[str, Any]]:
        """What the recipe says about a phase in a run of `ranks`; a later one overrides those before."""
        return [self.settings, _layout(self.layouts, ranks), phase.settings, _layout(phase.layouts, ranks)]

    def every_setting(self) -> list[dict[str, Any]]:
        """What the recipe says anywhere, of phases and numbers of ranks that this run does not have, too."""
        phases = [settings for phase in self.phases for settings in (phase.settings, *phase.layouts.values())]
        return [self.settings, *self.layouts.values(), *phases]

    def choose(self, names: str | None) -> tuple[Phase, ...]:
        """The phases named in a comma-separated list, in the recipe's order; None means all."""
        if names is None:
            return self.phases
        wanted = [name.strip() for name in names.split(",") if name.strip()]
        known = [phase.name for phase in self.phases]
        if not wanted:
            raise UserError(f"--phases names none: {self.path} has {', '.join(known)}")
        for name in wanted:
            if name not in known:
                raise UserError(f"--phases {name}: {self.path} has no such phase; it has {', '.join(known)}")
        return tuple(phase for phase in self.phases if phase.name in wanted)


def load_recipe(path: str | Path) -> Recipe:
    path = Path(path)
    document = _read_yaml(path)
    phases = document.pop("phases", None)
    if not isinstance(phases, list) or not phases:
        raise UserError(f"{path}: needs a list `phases:` with at least one phase")
    layouts = _parse_layouts(document.pop("layouts", None), path)
    return Recipe(path, _join_sections(document, path), layouts, _parse_phases(phases, path))


def _layout(layouts: Layouts, ranks: int) -> dict[str, Any]:
    return layouts[max(reached)] if (reached := [number for number in layouts if number <= ranks]) else {}


def _parse_layouts(layouts: Any, path: Path) -> Layouts:
    layouts = layouts or {}
    good = isinstance(layouts, dict) and all(
        isinstance(ranks, int) and ranks > 0 and isinstance(settings, dict)
        for ranks, settings in layouts.items()
    )
    if not good:
        raise UserError(f"{path}: layouts must map numbers of ranks to settings, such as 8: {{...}}")
    return layouts


class _Loader(yaml.SafeLoader):
    """Refuses a key that is written twice, of which YAML keeps the last one without a word."""

    def construct_mapping(self, node, deep=False):
        own = [key for key, _ in node.value if not key.tag.endswith(":merge")]
        values = [self.construct_object(key, deep=True) for key in own]
        for key, value in zip(own, values, strict=True):
            if isinstance(value, str) and values.count(value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{value} is set twice", key.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict:
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(
            f"--config {path}: {error.strerror}; give a recipe such as examples/recipes/*.yaml"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"--config {path}: is not YAML: {error}") from error
    if not isinstance(document, dict):
        raise UserError(
            f"--config {path}: must map section names to settings, found {type(document).__name__}"
        )
    return document


def _join_sections(document: dict, path: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for section, values in document.items():
        if section not in SECTIONS:
            raise UserError(unknown_key(section, [*SECTIONS, "layouts", "phases"], path, "section"))
        if not isinstance(values or {}, dict):
            raise UserError(f"{path}: section {section} must map names to values, found {values}")
        for key, value in (values or {}).items():
            if key in settings:
                raise UserError(f"{path}: {key} is set twice; keep one of them")
            settings[key] = value
    return settings


def _parse_phases(phases: list, path: Path) -> tuple[Phase, ...]:
    parsed = []
    for number, fields in enumerate(phases, start=1):
        name = fields.get("name") if isinstance(fields, dict) else None
        if not isinstance(name, str) or not name.isidentifier():  # YAML takes a bare yes or on for true
            raise UserError(f"{path}: phase {number} needs a `name:` of letters, digits and underscores")
        settings = {key: value for key, value in fields.items() if key not in PHASE_FIELDS}
        coverage = fields.get("minimum_coverage")
        if coverage is not None and not (isinstance(coverage, int | float) and 0 <= coverage <= 1):
            raise UserError(f"{path}: minimum_coverage {coverage} of phase {name} must be in 0..1")
        layouts = _parse_layouts(fields.get("layouts"), path)
        parsed.append(Phase(number, name, settings, layouts, coverage))
    names = [phase.name for phase in parsed]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two phases have the same name; names are {', '.join(names)}")
    return tuple(parsed)


def unknown_key(key: str, known: list[str], where: Path | str, kind: str = "key") -> str:
    """The message for a name that nothing knows, with the nearest one that exists."""
    near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
    return f"{where}: unknown {kind} {key}" + (f"; did you mean {near[0]}?" if near else "")


def flag_words(settings: dict[str, Any], options: dict[str, argparse.Action], where: Path) -> list[str]:
    """Settings as command-line words.

    Args:
        settings: flag name with underscores -> value.
        options: the same names -> the parser's action of that flag.
        where: the file, for messages.
    """
    words: list[str] = []
    for key, value in settings.items():
        if key not in options:
            raise UserError(unknown_key(key, list(options), where))
        words += _words(key, value, options[key], where)
    return words


def _words(key: str, value: Any, action: argparse.Action, where: Path) -> list[str]:
    flag = "--" + key.replace("_", "-")
    if flag not in action.option_strings:
        flag = "--" + key
    if isinstance(action, argparse.BooleanOptionalAction):
        return [flag if _boolean(key, value, where) else "--no-" + flag[2:]]
    if action.nargs == 0:
        return [flag] if _boolean(key, value, where) else []
    if value is None:
        raise UserError(f"{where}: {key} has no value")
    if action.nargs is not None:
        return [flag, *map(str, value if isinstance(value, list) else str(value).split())]
    if isinstance(value, bool) and {"on", "off"} & set(action.choices or ()):
        value = "on" if value else "off"  # YAML takes the bare words for true and false
    if isinstance(value, list | dict | bool):
        raise UserError(f"{where}: {key} takes one value, found {value}")
    return [f"{flag}={value}"]


def _boolean(key: str, value: Any, where: Path) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{where}: {key} is a switch and takes true or false, found {value}")
    return value
