"""Read and check a study's YAML file: its cells, and the tables that compare them.

A *cell* is one command with its flags. A value may name another cell in braces: that cell's output
folder, of the same seed; ``{seed}`` is the seed.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from shared.errors import ConfigurationError
from shared.nearest import nearest
from shared.yaml_file import flag_arguments, read_yaml

TRAINER_COMMANDS = ("sft", "distill", "evaluate", "merge")
UNNAMED = ""  # the name of the only teacher of a cell that names none
_REFERENCE = re.compile(r"\{([^{}]*)\}")
_NAME = re.compile(r"[\w.=-]+")


@dataclass(frozen=True)
class Cell:
    """A command with its flags.

    Attributes:
        command: of `student-trainer`, or a Python module (which takes ``--output_dir`` too).
        source: the key in the file, for errors.
        teachers: the cells whose models are served while this one runs, by the name that rows call
            them; a single one may be `UNNAMED`.
        coordinates: what a grid set in it, by key.
        measures: the cell whose model it measures; itself, where a table names an `evaluate` cell.
    """

    name: str
    command: str
    flags: Mapping[str, Any]
    source: str
    teachers: Mapping[str, str] = field(default_factory=dict)
    coordinates: Mapping[str, Any] = field(default_factory=dict)
    measures: str | None = None

    def inputs(self) -> list[str]:
        """Return the cells that the flags and the teachers name, each once."""
        named = [n for value in self.flags.values() for n in references(value) if n != "seed"]
        return list(dict.fromkeys([*named, *self.teachers.values()]))


@dataclass(frozen=True)
class Table:
    """A comparison of cells by one metric, a key of the ``results.json`` of measuring cells.

    ``x`` and ``series`` are grid keys, ``differences`` are pairs.
    """

    name: str
    title: str
    cells: tuple[str, ...]
    x: str | None
    series: str | None
    differences: tuple[tuple[str, str], ...]
    metric: str


@dataclass(frozen=True)
class Study:
    """The content of a study's file.

    Attributes:
        cells: by name, inputs before those who use them; a measuring cell follows each that a table
            compares, unless that one is an `evaluate` cell, which has measured already.
        metric: the metric of tables that name no other.
        serve: flags of `teacher-server serve`.
        drop_weights: delete a model's weights once all cells that use it are done.
    """

    path: Path
    title: str
    seeds: tuple[int, ...]
    cells: Mapping[str, Cell]
    metric: str
    serve: Mapping[str, Any]
    tables: tuple[Table, ...]
    drop_weights: bool

    def metrics(self) -> list[str]:
        """Return the study's metric, then those that tables name besides."""
        return list(dict.fromkeys([self.metric, *(table.metric for table in self.tables)]))


def load_study(path: Path) -> Study:
    """Read and check a study's file.

    Raises:
        ConfigurationError: what is wrong, with the file and the key.
    """
    content = read_yaml(path, str(path))
    try:
        return _study(path, content)
    except _ContentError as error:
        raise ConfigurationError(f"{path}: {error}") from error


def references(value: Any) -> list[str]:
    """Return the names in braces in a flag's value."""
    if isinstance(value, list):
        return [name for item in value for name in references(item)]
    return _REFERENCE.findall(value) if isinstance(value, str) else []


def substituted(value: Any, by: Mapping[str, str]) -> Any:
    """Return a flag's value with names in braces replaced as ``by`` says; others stay."""
    if isinstance(value, list):
        return [substituted(item, by) for item in value]
    if not isinstance(value, str):
        return value
    return _REFERENCE.sub(lambda found: by.get(found[1], found[0]), value)


def to_argv(flags: Mapping[str, Any]) -> list[str]:
    """Return flags as command-line arguments, without those that are null."""
    return [argument for name, value in flags.items() for argument in flag_arguments(name, value)]


def hint_for(name: str, names: Iterable[str]) -> str:
    """Return a hint for an unknown name: the nearest one, or all there are."""
    near = nearest(name, names)
    return f"did you mean {near}?" if near else f"there is {', '.join(names)}"


class _ContentError(Exception):
    """A mistake in the file's content; `load_study` adds the file's name."""


def _study(path: Path, content: Any) -> Study:
    keys = ("title", "seeds", "drop_weights", "defaults", "serve", "cells", "measure", "tables")
    top = _mapping(content, "the file", keys)
    seeds = top.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(type(s) is int for s in seeds):
        raise _ContentError(f"seeds: {seeds!r} must be a list of whole numbers")
    drop_weights = top.get("drop_weights", False)
    if not isinstance(drop_weights, bool):
        raise _ContentError(f"drop_weights: {drop_weights!r} must be true or false")
    defaults = _mapping(top.get("defaults", {}), "defaults")
    cells: dict[str, Cell] = {}
    for name, entry in _mapping(top.get("cells"), "cells").items():
        for cell in _expand(name, entry, defaults):
            if cell.name in cells:
                raise _ContentError(f"{cell.source}: a second cell named {cell.name}")
            cells[cell.name] = cell
    tables = tuple(
        _table(name, entry, cells)
        for name, entry in _mapping(top.get("tables", {}), "tables").items()
    )
    metric = ""
    compared = list(dict.fromkeys(name for table in tables for name in table.cells))
    for name in compared:
        if cells[name].command == "evaluate":
            cells[name] = replace(cells[name], measures=name)
    if tables:
        measure = _mapping(top.get("measure"), "measure", ("command", "flags", "teacher", "metric"))
        metric = str(measure.get("metric", "pass@1"))
        tables = tuple(replace(table, metric=table.metric or metric) for table in tables)
        for name in compared:
            if cells[name].measures == name:
                continue
            cell = _measure(name, measure, defaults)
            if cell.name in cells:
                raise _ContentError(f"cells.{cell.name}: the measure of {name} has this name")
            cells[cell.name] = cell
    for cell in cells.values():
        _check_inputs(cell, cells)
    return Study(
        path=path,
        title=str(top.get("title", path.stem)),
        seeds=tuple(dict.fromkeys(seeds)),
        cells=_sorted(cells),
        metric=metric,
        serve=_mapping(top.get("serve", {}), "serve"),
        tables=tables,
        drop_weights=drop_weights,
    )


def _expand(name: str, entry: Any, defaults: Mapping[str, Any]) -> Iterator[Cell]:
    """Yield the cell, or one for each combination of its grids, named after their values.

    A value that names another cell in braces becomes that name.
    """
    source = f"cells.{name}"
    if not _NAME.fullmatch(name) or name in ("seed", "model"):
        raise _ContentError(f"{source}: a name has letters, digits and _ . = - only, and is not "
                            "`seed` or `model`")  # fmt: skip
    entry = _mapping(entry, source, ("command", "flags", "teacher", "grid"))
    cell = _cell(name, entry, source, defaults)
    grids = entry.get("grid")
    if grids is None:
        yield cell
        return
    for grid in grids if isinstance(grids, list) else [grids]:
        axes = _mapping(grid, f"{source}.grid")
        named = [key for key, values in axes.items() if isinstance(values, list)]
        for values in itertools.product(*(axes[key] for key in named)):
            coordinates = {**axes, **dict(zip(named, values, strict=True))}
            flags = {key: value for key, value in coordinates.items() if key != "teacher"}
            yield replace(
                cell,
                name=".".join([name, *(_REFERENCE.sub(r"\1", str(value)) for value in values)]),
                flags={**cell.flags, **flags},
                teachers=_teachers(coordinates.get("teacher"), f"{source}.grid") or cell.teachers,
                coordinates=coordinates,
            )


def _cell(name: str, entry: Mapping[str, Any], source: str, defaults: Mapping[str, Any]) -> Cell:
    command = entry.get("command")
    if not isinstance(command, str) or not (command in TRAINER_COMMANDS or "." in command):
        raise _ContentError(
            f"{source}.command: {command!r} is none of {', '.join(TRAINER_COMMANDS)}, "
            "nor a module such as package.module"
        )
    flags = {
        **_mapping(defaults.get(command, {}), f"defaults.{command}"),
        **_mapping(entry.get("flags", {}), f"{source}.flags"),
    }
    for key in ("output_dir", "teacher_url"):
        if key in flags:
            raise _ContentError(f"{source}.flags.{key}: the study sets it; drop it")
    return Cell(name, command, flags, source, _teachers(entry.get("teacher"), source))


def _teachers(value: Any, source: str) -> dict[str, str]:
    """Return the cells of ``teacher``, a cell or `name: cell` lines, by name."""
    if value is None:
        return {}
    if isinstance(value, dict) and value:
        return {str(name): str(cell) for name, cell in value.items()}
    if not isinstance(value, str):
        raise _ContentError(f"{source}.teacher: {value!r} is neither a cell nor `name: cell` lines")
    return {UNNAMED: value}


def _measure(name: str, entry: Mapping[str, Any], defaults: Mapping[str, Any]) -> Cell:
    """Return the cell that measures the model of cell ``name``."""
    cell = _cell("measure", entry, "measure", defaults)
    if not any("model" in references(value) for value in cell.flags.values()):
        raise _ContentError("measure.flags: none has {model}, the model to measure")
    flags = {k: substituted(value, {"model": f"{{{name}}}"}) for k, value in cell.flags.items()}
    return replace(cell, name=f"{name}.{cell.command}", flags=flags, measures=name)


def _table(name: str, entry: Any, cells: Mapping[str, Cell]) -> Table:
    source = f"tables.{name}"
    entry = _mapping(entry, source, ("title", "metric", "cells", "x", "series", "differences"))
    chosen = dict.fromkeys(
        cell
        for pattern in entry.get("cells", [])
        for cell in _matching(pattern, cells, f"{source}.cells")
    )
    pairs: list[tuple[str, str]] = []
    for pair in entry.get("differences", []):
        key = f"{source}.differences"
        if not isinstance(pair, list) or len(pair) != 2:
            raise _ContentError(f"{key}: {pair!r} must be [cell, the cell it is held against]")
        base = _matching(pair[1], chosen, key)[0]
        pairs += [(cell, base) for cell in _matching(pair[0], chosen, key) if cell != base]
    axes = {key: entry[key] for key in ("x", "series") if key in entry}
    for key, axis in axes.items():
        for cell in chosen:
            if axis not in cells[cell].coordinates:
                raise _ContentError(f"{source}.{key}: the grid of {cell} has no {axis!r}")
    if "series" in axes and "x" not in axes:
        raise _ContentError(f"{source}.series: lines need an x")
    return Table(
        name,
        str(entry.get("title", name)),
        tuple(chosen),
        axes.get("x"),
        axes.get("series"),
        tuple(pairs),
        str(entry.get("metric", "")),
    )


def _matching(pattern: Any, names: Iterable[str], source: str) -> list[str]:
    found = [name for name in names if fnmatchcase(name, str(pattern))]
    if not found:
        raise _ContentError(
            f"{source}: {pattern!r} matches no cell; {hint_for(str(pattern), names)}"
        )
    return found


def _check_inputs(cell: Cell, cells: Mapping[str, Cell]) -> None:
    if cell.teachers and cell.command not in ("distill", "evaluate"):
        raise _ContentError(f"{cell.source}.teacher: only distill and evaluate ask one; drop it")
    if cell.command == "distill" and not cell.teachers:
        raise _ContentError(
            f"{cell.source}.teacher is missing: name the cell whose model is served"
        )
    named = {"teacher": list(cell.teachers.values())}
    named |= {f"flags.{key}": references(value) for key, value in cell.flags.items()}
    for key, names in named.items():
        for name in names:
            if name != "seed" and name not in cells:
                hint = hint_for(name, cells)
                raise _ContentError(f"{cell.source}.{key}: unknown cell {name!r}; {hint}")


def _sorted(cells: Mapping[str, Cell]) -> dict[str, Cell]:
    """Return inputs before their users, else in the order of the file.

    A measure comes right behind what it measures, so that a run that is cut has whole results.
    """
    found: dict[str, Cell] = {}
    measure_of = {cell.measures: cell.name for cell in cells.values() if cell.measures}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            circle = " → ".join([*path[path.index(name) :], name])
            raise _ContentError(f"{cells[name].source}: a cycle, {circle}")
        if name not in found:
            for other in cells[name].inputs():
                visit(other, (*path, name))
            found[name] = cells[name]

    for name in cells:
        visit(name, ())
        if name in measure_of:
            visit(measure_of[name], ())
    return found


def _mapping(value: Any, source: str, known: Sequence[str] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _ContentError(f"{source} must hold `name: value` lines, not {value!r}")
    for key in value:
        if known is not None and key not in known:
            where = "" if source == "the file" else f"{source}."
            raise _ContentError(f"{where}{key}: unknown key; {hint_for(str(key), known)}")
    return {str(key): item for key, item in value.items()}
