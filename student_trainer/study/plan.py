"""Turn the cells of a study into jobs.

A *job* is a cell at one seed. Cells into which no ``{seed}`` flows, by a flag or through an input,
run once for all seeds; cells with equal commands and inputs are one job.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from shared import __version__
from shared.errors import ConfigurationError
from student_trainer.study.spec import (
    UNNAMED,
    Cell,
    Study,
    hint_for,
    references,
    substituted,
    to_argv,
)


@dataclass(frozen=True)
class Job:
    """A cell at one seed.

    Attributes:
        seed: None where it runs once for all seeds.
        folder: of its output, relative to the study's; also its identity.
        argv: flags; ``{FOLDER}`` stands for another job's output folder.
        inputs: folders of other jobs.
        teachers: names and folders of the jobs whose models are served meanwhile.
        digest: of command, flags and everything that flows in.
    """

    cell: Cell
    seed: int | None
    folder: str
    argv: tuple[str, ...]
    inputs: tuple[str, ...]
    teachers: tuple[tuple[str, str], ...]
    digest: str


@dataclass(frozen=True)
class Plan:
    """The jobs by folder, in the order of seeds, then of cells, and the folder of each cell."""

    jobs: Mapping[str, Job]
    folder_of: Mapping[tuple[str, int], str]

    def users(self, folder: str) -> list[Job]:
        """Return the jobs into which the output of one flows, in however many steps.

        An adapter's measure reads the base of the adapter, of which none of its flags tells.
        """
        found = {folder}
        for job in self.jobs.values():  # inputs come before their users
            if found.intersection(job.inputs):
                found.add(job.folder)
        return [self.jobs[other] for other in self.jobs if other in found - {folder}]


def make_plan(study: Study, seeds: Sequence[int]) -> Plan:
    """Return the jobs of all cells at the given seeds."""
    jobs: dict[str, Job] = {}
    folder_of: dict[tuple[str, int], str] = {}
    same: dict[str, str] = {}  # digest -> folder
    for seed in seeds:
        for cell in study.cells.values():
            inputs = {name: jobs[folder_of[name, seed]] for name in cell.inputs()}
            job = _job(cell, seed, inputs, study.serve)
            folder = same.setdefault(job.digest, job.folder)
            jobs.setdefault(folder, job)
            folder_of[cell.name, seed] = folder
    return Plan(jobs, folder_of)


def select(study: Study, plan: Plan, seeds: Sequence[int], only: Sequence[str]) -> list[Job]:
    """Return the jobs of some seeds whose cells a pattern names, with their measures and inputs.

    A pattern names cells, or tables with all their cells; without a pattern all cells are taken.

    Raises:
        ConfigurationError: a pattern that matches no cell and no table.
    """
    names = set(study.cells)
    if only:
        names = set()
        for pattern in only:
            matching = {name for name in study.cells if fnmatchcase(name, pattern)}
            for table in study.tables:
                if fnmatchcase(table.name, pattern):
                    matching.update(table.cells)
            if not matching:
                known = [*(table.name for table in study.tables), *study.cells]
                raise ConfigurationError(
                    f"--only {pattern} matches no table and no cell of {study.path}; "
                    f"{hint_for(pattern, known)}"
                )
            names |= matching
        names |= {cell.name for cell in study.cells.values() if cell.measures in names}
    wanted = {
        folder for (name, seed), folder in plan.folder_of.items() if name in names and seed in seeds
    }
    for folder, job in reversed(list(plan.jobs.items())):  # users come before their inputs
        if folder in wanted:
            wanted.update(job.inputs)
    return [job for folder, job in plan.jobs.items() if folder in wanted]


def _job(cell: Cell, seed: int, inputs: Mapping[str, Job], serve: Mapping[str, Any]) -> Job:
    seeded = any("seed" in references(value) for value in cell.flags.values())
    seeded = seeded or any(job.seed is not None for job in inputs.values())

    def argv(stand_ins: Mapping[str, str]) -> list[str]:
        by = {**stand_ins, "seed": str(seed)}
        return to_argv({key: substituted(value, by) for key, value in cell.flags.items()})

    teachers = {name: inputs[other] for name, other in cell.teachers.items()}
    everything = [
        __version__,
        cell.command,
        sorted(argv({name: job.digest for name, job in inputs.items()})),
        [_teachers_digest(teachers), to_argv(serve)] if teachers else None,
        sorted(filter(None, map(_file_digest, cell.flags.values()))),
    ]
    return Job(
        cell=cell,
        seed=seed if seeded else None,
        folder=f"seed-{seed}/{cell.name}" if seeded else f"shared/{cell.name}",
        argv=tuple(argv({name: f"{{{job.folder}}}" for name, job in inputs.items()})),
        inputs=tuple(job.folder for job in inputs.values()),
        teachers=tuple((name, job.folder) for name, job in teachers.items()),
        digest=hashlib.sha256(json.dumps(everything).encode()).hexdigest(),
    )


def _teachers_digest(teachers: Mapping[str, Job]) -> Any:
    """Return the digests of the teachers by name; of one without a name, its digest alone."""
    if list(teachers) == [UNNAMED]:
        return teachers[UNNAMED].digest
    return [[name, job.digest] for name, job in teachers.items()]


def _file_digest(value: Any) -> str | None:
    """Return the digest of the file that a flag names, or None if it names none.

    A data file's content is an input of the job too.
    """
    if not isinstance(value, str) or not Path(value).is_file():
        return None
    return hashlib.sha256(Path(value).read_bytes()).hexdigest()
