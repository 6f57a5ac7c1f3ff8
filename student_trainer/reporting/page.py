"""Render runs as one self-contained HTML page without scripts or network."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape

from student_trainer.reporting.axes import format_number
from student_trainer.reporting.cards import heat_key, heat_scale, key_line, run_class, side_by_side
from student_trainer.reporting.content import Cell, Chart, Delta, Range, Report, Samples, Table
from student_trainer.reporting.style import CSS
from student_trainer.reporting.svg import (
    LINES_SIZE,
    Point,
    colour_class,
    describe_lines,
    draw_lines,
)

_BADGES = {"lower": "↓ lower is better", "higher": "↑ higher is better"}


def render(report: Report) -> str:
    """Return the page as one HTML document."""
    return document(report.title, content(report))


def document(title: str, main: str, *, script: str = "") -> str:
    """Return an HTML document that needs nothing else, with what `content` returned in it."""
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>"
        f"<body><main>{main}</main>{f'<script>{script}</script>' if script else ''}</body></html>\n"
    )


def content(report: Report) -> str:
    """Return the sections of the page, each with an id."""
    return head(report) + body(report)


def head(report: Report) -> str:
    """Return the first section: title, lead and status."""
    status = f"<p class=status role=status>{escape(report.status)}</p>" if report.status else ""
    lead = "".join(f"<p class=lead>{escape(paragraph)}</p>" for paragraph in report.lead)
    note = f"<p class=note>{escape(report.note)}</p>" if report.note else ""
    return f"<section id=top><h1>{escape(report.title)}</h1>{lead}{note}{status}</section>"


def body(report: Report) -> str:
    """Return the sections after the first."""
    sections = {}
    for i, (title, table) in enumerate(report.tables.items()):
        heading = f"<h2>{escape(title)}</h2>" if title else ""
        sections[f"table-{i}"] = heading + _table(table, title)
    if report.charts:
        sections["curves"] = f"<h2>Curves</h2>{_charts(report.charts)}"
    if report.seconds:
        bars = _time_bars(report.seconds, report.numbers)
        sections["time"] = f"<h2>Where the time went</h2>{bars}"
    scale = heat_scale([card for samples in report.samples for card in samples.cards])
    for i, samples in enumerate(report.samples):
        sections[f"samples-{i}"] = _samples(samples, scale)
    if report.commands:
        lines = escape("\n".join(report.commands))
        sections["commands"] = f"<h2>Commands</h2><pre class=commands>{lines}</pre>"
    return "".join(f"<section id={name}>{body}</section>" for name, body in sections.items())


def _table(table: Table, title: str) -> str:
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in table.columns)
    scales = [_column_scale(column) for column in zip(*table.rows, strict=True)]
    rows = []
    for i, row in enumerate(table.rows):
        number = table.numbers[i] if table.numbers else None
        name, *cells = [_cell(cell, scale) for cell, scale in zip(row, scales, strict=True)]
        cells = [
            f'<td data-label="{escape(column)}">{cell}</td>'
            for column, cell in zip(table.columns[1:], cells, strict=True)
        ]
        classes = ["best"] * (i == table.best) + run_class(number)
        rows.append(
            f'<tr class="{" ".join(classes)}"><th scope=row>{key_line(number)}{name}</th>'
            f"{''.join(cells)}</tr>"
        )
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    note = f"<p class=note>{escape(table.note)}</p>" if table.note else ""
    label = escape(title or "Table")
    return (
        f'<div class=scroll role=region tabindex=0 aria-label="{label}"><table>{body}</table></div>'
        + note
    )


def _column_scale(column: Sequence[Cell]) -> Point:
    ranges = [cell for cell in column if isinstance(cell, Range)]
    low = min((r.low for r in ranges), default=0.0)
    high = max((r.high for r in ranges), default=1.0)
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _cell(cell: Cell, scale: Point) -> str:
    if isinstance(cell, str):
        return escape(cell)
    if isinstance(cell, Delta):
        return _delta(cell)

    def percent(value: float) -> float:
        return 100 * (value - scale[0]) / (scale[1] - scale[0])

    start, end = percent(cell.low), percent(cell.high)
    return (
        f"<span>{cell.value:.3f} <small>{cell.low:.3f} to {cell.high:.3f}</small></span>"
        f'<span class=range><i style="left:{start:.1f}%;width:{end - start:.1f}%"></i>'
        f'<b style="left:{percent(cell.value):.1f}%"></b></span>'
    )


def _delta(cell: Delta) -> str:
    """Return an interval on a scale of its own, with 0 in the middle."""
    reach = max(abs(cell.low), abs(cell.high))
    start, end = (50 + 50 * value / reach for value in (cell.low, cell.high))
    return (
        f"<span>{escape(cell.text)}</span><span class='range zero {cell.verdict}'>"
        f'<i style="left:{start:.1f}%;width:{end - start:.1f}%"></i></span>'
    )


def _charts(charts: Sequence[Chart]) -> str:
    """Return the charts, and a line of text for each whose values never change."""
    figures, lines = [], []
    for place, chart in enumerate(charts):
        constant = chart.constant()
        if constant:
            said = f"{chart.words} {chart.advice}".strip()
            lines.append(
                f"<li><b>{escape(chart.title)}</b> {escape(constant)}. "
                f"<span class=note>{_flags_whole(said)}</span></li>"
            )
        else:
            figures.append(_chart(chart, place))
    found = f"<div class=charts>{''.join(figures)}</div>" if any(figures) else ""
    return found + (f"<ul class=constant>{''.join(lines)}</ul>" if lines else "")


def _samples(samples: Samples, scale: float) -> str:
    key = heat_key(scale) if any(card.shaded for card in samples.cards) else ""
    cards = "".join(side_by_side(card, scale) for card in samples.cards)
    note = f"<p class=note>{escape(samples.note)}</p>" if samples.note else ""
    return f"<h2>{escape(samples.title)}</h2>{note}{key}{cards}"


def _chart(chart: Chart, place: int) -> str:
    drawn = draw_lines(
        chart.series, chart.x_label, chart.y_label, share=chart.share, numbers=chart.numbers
    )
    if not drawn:
        return ""
    width, height = LINES_SIZE
    words = escape(describe_lines(chart.series, chart.x_label, share=chart.share))
    badge = f"<em class=badge>{_BADGES[chart.better]}</em>" if chart.better else ""
    notes = "".join(
        f"<p class=note>{_flags_whole(text)}</p>" for text in (chart.words, chart.note) if text
    )
    return (
        f"<figure><figcaption>{escape(chart.title)} {badge}</figcaption>{notes}"
        f"<svg viewBox='0 0 {width} {height}' role=img aria-labelledby='t{place} d{place}'>"
        f"<title id=t{place}>{escape(chart.title)}</title><desc id=d{place}>{words}</desc>"
        f"{drawn}</svg>{_chart_legend(chart)}</figure>"
    )


def _flags_whole(text: str) -> str:
    """Return the text as HTML in which no line ends within a flag."""
    return re.sub(r"--\w+", r"<code>\g<0></code>", escape(text))


def _chart_legend(chart: Chart) -> str:
    """Return the lines of a chart with their last values."""
    order = {name: i for i, name in enumerate(chart.series)}
    items = "".join(
        f"<li>{key_line((chart.numbers or order)[name])}{escape(name)} "
        f"<b>{format_number(line[-1][1], share=chart.share)}</b></li>"
        for name, line in chart.series.items()
        if line
    )
    return f"<ul class=legend aria-label='last values'>{items}</ul>"


def _time_bars(
    seconds: Mapping[str, Mapping[str, float]], numbers: Mapping[str, int] | None
) -> str:
    """Return a bar a part of each run, all on one scale, in the colour of the run."""
    order = {run: i for i, run in enumerate(seconds)}
    longest = max((part for run in seconds.values() for part in run.values()), default=0) or 1.0
    blocks = []
    for run, parts in seconds.items():
        number, total = (numbers or order)[run], sum(parts.values()) or 1.0
        colour = colour_class(number)
        rows = "".join(
            f"<li><span>{escape(name)}</span>"
            f'<i><b class="{colour}" style="width:{100 * value / longest:.2f}%"></b></i>'
            f"<span>{_time(value)} <small>{format_number(value / total, share=True)}</small>"
            "</span></li>"
            for name, value in parts.items()
        )
        blocks.append(
            f"<h3>{key_line(number)}{escape(run)} <small>{_time(sum(parts.values()))}</small></h3>"
            f"<ul class=times>{rows}</ul>"
        )
    note = (
        "<p class=note>All bars are on one scale. Time that waits for the teacher is lost to "
        "training: above about a fifth, a faster teacher, a cache or larger batches shorten the "
        "run; below, they do not.</p>"
    )
    waits = any("waiting for the teacher" in parts for parts in seconds.values())
    return (note if waits else "") + "".join(blocks)


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
