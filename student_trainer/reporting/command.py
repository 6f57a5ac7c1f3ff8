"""Run `student-trainer report`: write a page, and plots, of runs."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from shared.command_line import OneLineParser
from shared.errors import ConfigurationError
from student_trainer.reporting.content import Chart, Report
from student_trainer.reporting.curves import charts_of
from student_trainer.reporting.differences import difference_tables
from student_trainer.reporting.introduction import how_to_read, introduction
from student_trainer.reporting.page import render
from student_trainer.reporting.runs import Found, find_runs
from student_trainer.reporting.samples import samples_of
from student_trainer.reporting.svg import check_png, write_lines, write_png
from student_trainer.reporting.tables import tables_of
from student_trainer.reporting.watch import LivePage, watch
from student_trainer.runtime.folders import check_output_file, check_output_folder


def report(argv: Sequence[str]) -> None:
    """Write a page, and plots if they are wanted, of the runs in some folders, or serve it.

    Raises:
        ConfigurationError: a folder without a run, one that cannot be written to, flags that have
            no effect together, or a port that is taken.
        DatasetError: a file of a run that cannot be read.
    """
    arguments = make_parser().parse(argv)
    _check(arguments)
    if arguments.watch:
        title = _title(arguments)
        watch(LivePage(arguments.runs, lambda found: page_of(found, title)), arguments.port)
        return
    found = find_runs(arguments.runs)
    output = arguments.output or arguments.runs[0] / "report.html"
    check_output_file("--output", output)
    if arguments.plots:
        check_output_folder("--plots", arguments.plots)
    page = page_of(found, _title(arguments))
    try:
        output.write_text(render(page), encoding="utf-8")
        sys.stdout.write(f"wrote {output}\n")
        if arguments.plots:
            arguments.plots.mkdir(parents=True, exist_ok=True)
            _write_plots(page.charts, arguments.plots, png=arguments.png)
    except OSError as error:
        raise ConfigurationError(f"{error.filename}: {error.strerror}") from error


def page_of(found: Found, title: str) -> Report:
    """Return the content of the page."""
    numbers = {run.name: number for number, run in enumerate(found.training)}
    return Report(
        title=title,
        lead=introduction(found, compared=bool(difference_tables(found))),
        note=how_to_read(found),
        tables=tables_of(found),
        charts=charts_of(found.training),
        seconds={run.name: run.seconds() for run in found.training if run.seconds()},
        numbers=numbers,
        samples=samples_of(found),
    )


def _write_plots(charts: Sequence[Chart], folder: Path, *, png: bool) -> None:
    for chart in charts:
        name = re.sub(r"[^a-z0-9]+", "-", chart.title.lower()).strip("-")
        constant = chart.constant()
        if constant:
            sys.stdout.write(f"{chart.title} has no plot: it is {constant}\n")
            continue
        path = folder / f"{name}.svg"
        write_lines(
            path,
            chart.title,
            chart.x_label,
            chart.y_label,
            chart.series,
            note=chart.advice,
            share=chart.share,
            numbers=chart.numbers,
        )
        for written in (path, *([write_png(path)] if png else [])):
            sys.stdout.write(f"wrote {written}\n")


def _title(arguments: argparse.Namespace) -> str:
    names = ", ".join(dict.fromkeys(path.resolve().name for path in arguments.runs))
    return arguments.title or names


def _check(arguments: argparse.Namespace) -> None:
    """Refuse flags that would have no effect."""
    if arguments.png and not arguments.plots:
        raise ConfigurationError("--png writes beside the SVG files of --plots: give --plots DIR")
    if arguments.png:
        check_png()
    if arguments.port is not None and not arguments.watch:
        raise ConfigurationError("--port is of --watch: give --watch, or leave --port out")
    for name in ("output", "plots"):
        if arguments.watch and getattr(arguments, name):
            raise ConfigurationError(
                f"--{name} has no effect with --watch, which writes no file: give one of them"
            )


def make_parser() -> OneLineParser:
    parser = OneLineParser(
        prog="student-trainer report",
        description="One page without network or scripts: differences between runs, curves, where "
        "the time went, scores with intervals, samples side by side.",
    )
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="output folder of sft, distill, evaluate or study, or a folder that holds such",
    )
    parser.add_argument("--output", type=Path, help="default: report.html in the first RUN")
    parser.add_argument("--title", help="of the page; default: the names of the folders")
    parser.add_argument(
        "--plots",
        type=Path,
        metavar="DIR",
        help="write each chart there as an SVG file, for print",
    )
    parser.add_argument(
        "--png",
        action="store_true",
        help="with --plots: as PNG too (needs pip install 'sparse-gkd[png]')",
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="serve the page on 127.0.0.1 while the runs train, refreshed every few seconds; no "
        "file is written, and Ctrl-C ends it",
    )
    parser.add_argument("--port", type=int, help="of --watch; default: one that is free")
    return parser
