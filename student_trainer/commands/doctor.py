"""The command `doctor`: check this machine, and a teacher, line by line."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain

from shared import __version__
from shared.command_line import OneLineParser
from shared.errors import ConfigurationError, SparseGKDError
from shared.model_names import describe_missing
from shared.printable import printable
from student_trainer.commands.doctor_finding import Finding, Status
from student_trainer.commands.doctor_machine import machine_findings
from student_trainer.config.teachers import teachers_of
from student_trainer.runtime.terminal import Style, has_colours, painted

_STYLES: dict[Status, Style] = {"ok": "green", "warn": "yellow", "fail": "red", "off": "dim"}


class DoctorError(SparseGKDError):
    """A check that failed."""


def doctor(argv: Sequence[str]) -> None:
    """Print all findings.

    Raises:
        ConfigurationError: a flag is wrong.
        DoctorError: a check failed; its line says why.
    """
    arguments = make_parser().parse(argv)
    # Imported here, so that --help does not wait for what speaks with a teacher.
    from student_trainer.commands.doctor_teacher import teacher_findings

    found: list[Finding] = []
    colours = has_colours(sys.stdout)
    student = arguments.model_name_or_path
    if student is not None and not arguments.teacher_url:
        raise ConfigurationError(
            f"--model_name_or_path {student} is compared with a teacher; add --teacher_url"
        )
    if student is not None and (missing := describe_missing(student)):
        raise ConfigurationError(f"--model_name_or_path: {missing}; give a folder or a Hub id")
    for url in arguments.teacher_url:
        teachers_of([url])  # one that is no address is refused before this machine is looked at
    key_file = arguments.teacher_api_key_file
    teachers = (teacher_findings(url, key_file, student) for url in arguments.teacher_url)
    for finding in chain(machine_findings(), *teachers):
        found.append(finding)
        if not arguments.json:  # at once, since a teacher may take seconds to answer
            sys.stdout.write(_line(finding, colours))
            sys.stdout.flush()
    failed = [finding.check for finding in found if finding.status == "fail"]
    if arguments.json:
        report = {"ok": not failed, "version": __version__, "findings": [asdict(f) for f in found]}
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        sys.stdout.write(_summary(found, arguments.teacher_url) + "\n")
    if failed:
        raise DoctorError(f"doctor: {len(failed)} failed: {', '.join(failed)}")


def make_parser() -> OneLineParser:
    """Return the parser of the command."""
    parser = OneLineParser(
        prog="student-trainer doctor",
        description="Whether this machine can do what a run requires of it: versions, GPUs, disk, "
        "the Hub's cache, and the teacher. Exit code 1 if a line says fail, 2 for a wrong flag.",
    )
    parser.add_argument(
        "--teacher_url", action="extend", nargs="+", default=[], metavar="URL",
        help="ask this teacher server, too; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--teacher_api_key_file", metavar="FILE",
        help="that holds its API key; default: the environment variable TEACHER_API_KEY",
    )  # fmt: skip
    parser.add_argument(
        "--model_name_or_path", metavar="MODEL",
        help="the student: compare its tokenizer and its end tokens with the teacher's",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    return parser


def _line(finding: Finding, colours: bool) -> str:
    status = painted(finding.status.ljust(4), _STYLES[finding.status], colours)
    remedy = f"\n{'':21}-> {printable(finding.remedy)}" if finding.remedy else ""
    return f"{status} {finding.check.ljust(16)}{printable(finding.detail)}{remedy}\n"


def _summary(found: Sequence[Finding], urls: Sequence[str]) -> str:
    counts = Counter(finding.status for finding in found)
    text = ", ".join(f"{counts[status]} {status}" for status in _STYLES if counts[status])
    return text + ("" if urls else "; no teacher was checked: add --teacher_url http://host:8000")
