"""Render runs as one self-contained HTML page without scripts or network."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from student_trainer.reporting.svg import (
    LINES_SIZE,
    Point,
    colour_class,
    dashes,
    describe_lines,
    draw_lines,
    format_number,
)


@dataclass(frozen=True)
class Chart:
    """A chart of lines, name -> (x, y) points.

    Attributes:
        note: one or two sentences on what is good, shown under the title.
        share: y is a share, drawn from 0 to 100 %.
        numbers: name -> the number of its colour, as `draw_lines` takes it; default: their order.
    """

    title: str
    y_label: str
    series: Mapping[str, Sequence[Point]]
    x_label: str = "step"
    note: str = ""
    share: bool = False
    numbers: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Range:
    """A value with its interval, written and drawn on the scale of its column."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Table:
    """A header and rows of text and intervals; the row of index ``best`` is highlighted.

    Attributes:
        numbers: of the colour of each row's run; None for a row without a run.
        note: a sentence below.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str | Range]]
    best: int | None = None
    numbers: Sequence[int | None] = ()
    note: str = ""


@dataclass(frozen=True)
class SideBySide:
    """A prompt, its reference ("" if unknown), and what each model wrote.

    Attributes:
        completions: name -> (text, right or wrong).
        shaded: name -> the tokens of one text, with the divergence of that model from its teacher.
        numbers: name -> the number of the colour of its run, of those that are of a run.
    """

    prompt: str
    reference: str
    completions: Mapping[str, tuple[str, bool]]
    shaded: Mapping[str, Sequence[Token]] = field(default_factory=dict)
    numbers: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Token:
    """A token of a text, and the divergence of two distributions at its position.

    Attributes:
        divergence: nats.
        support: (token, the teacher's probability or None if unknown, the student's).
    """

    text: str
    divergence: float
    support: Sequence[tuple[str, float | None, float]]


@dataclass(frozen=True)
class Report:
    """The content of the page, top to bottom.

    Attributes:
        title: of the page.
        lead: one or two sentences under it.
        tables: comparisons, by title ("" for none).
        charts: curves.
        seconds: run -> part -> seconds, drawn as one bar a part.
        samples: completions side by side.
        commands: how to repeat the run.
        numbers: run of ``seconds`` -> the number of its colour; default: their order.
        status: a line of what the runs are doing now.
    """

    title: str
    lead: str
    tables: Mapping[str, Table]
    charts: Sequence[Chart] = ()
    seconds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    samples: Sequence[SideBySide] = ()
    commands: Sequence[str] = ()
    numbers: Mapping[str, int] | None = None
    status: str = ""


def render(report: Report) -> str:
    """Return the page as one HTML document."""
    return document(report.title, content(report))


def document(title: str, main: str, *, script: str = "") -> str:
    """Return an HTML document that needs nothing else, with what `content` returned in it."""
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head>"
        f"<body><main>{main}</main>{f'<script>{script}</script>' if script else ''}</body></html>\n"
    )


def content(report: Report) -> str:
    """Return the sections of the page, each with an id."""
    return head(report) + body(report)


def head(report: Report) -> str:
    """Return the first section: title, lead and status."""
    status = f"<p class=status role=status>{escape(report.status)}</p>" if report.status else ""
    return (
        f"<section id=top><h1>{escape(report.title)}</h1>"
        f"<p class=lead>{escape(report.lead)}</p>{status}</section>"
    )


def body(report: Report) -> str:
    """Return the sections after the first."""
    sections = {}
    for i, (title, table) in enumerate(report.tables.items()):
        heading = f"<h2>{escape(title)}</h2>" if title else ""
        sections[f"table-{i}"] = heading + _table(table, title)
    if report.charts:
        figures = "".join(_chart(chart, i) for i, chart in enumerate(report.charts))
        sections["curves"] = f"<h2>Curves</h2><div class=charts>{figures}</div>"
    if report.seconds:
        bars = _time_bars(report.seconds, report.numbers)
        sections["time"] = f"<h2>Where the time went</h2>{bars}"
    if report.samples:
        scale = _scale(report.samples)
        cards = "".join(_side_by_side(sample, scale) for sample in report.samples)
        sections["samples"] = f"<h2>Completions side by side</h2>{_key(scale)}{cards}"
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
        classes = ["best"] * (i == table.best) + _run_class(number)
        rows.append(
            f'<tr class="{" ".join(classes)}"><th scope=row>{_key_line(number)}{name}</th>'
            f"{''.join(cells)}</tr>"
        )
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    note = f"<p class=note>{escape(table.note)}</p>" if table.note else ""
    label = escape(title or "Table")
    return (
        f'<div class=scroll role=region tabindex=0 aria-label="{label}"><table>{body}</table></div>'
        + note
    )


def _run_class(number: int | None) -> list[str]:
    """Return the class under which ``--run`` is the colour of a run."""
    return [] if number is None else [f"n{number % 6}"]


def _column_scale(column: Sequence[str | Range]) -> Point:
    ranges = [cell for cell in column if isinstance(cell, Range)]
    low = min((r.low for r in ranges), default=0.0)
    high = max((r.high for r in ranges), default=1.0)
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _cell(cell: str | Range, scale: Point) -> str:
    if isinstance(cell, str):
        return escape(cell)

    def percent(value: float) -> float:
        return 100 * (value - scale[0]) / (scale[1] - scale[0])

    start, end = percent(cell.low), percent(cell.high)
    return (
        f"<span>{cell.value:.3f} <small>{cell.low:.3f} to {cell.high:.3f}</small></span>"
        f'<span class=range><i style="left:{start:.1f}%;width:{end - start:.1f}%"></i>'
        f'<b style="left:{percent(cell.value):.1f}%"></b></span>'
    )


def _chart(chart: Chart, place: int) -> str:
    drawn = draw_lines(
        chart.series, chart.x_label, chart.y_label, share=chart.share, numbers=chart.numbers
    )
    if not drawn:
        return ""
    width, height = LINES_SIZE
    words = escape(describe_lines(chart.series, chart.x_label, share=chart.share))
    note = f"<p class=note>{_flags_whole(chart.note)}</p>" if chart.note else ""
    return (
        f"<figure><figcaption>{escape(chart.title)}</figcaption>{note}"
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
        f"<li>{_key_line((chart.numbers or order)[name])}{escape(name)} "
        f"<b>{format_number(line[-1][1], share=chart.share)}</b></li>"
        for name, line in chart.series.items()
        if line
    )
    return f"<ul class=legend aria-label='last values'>{items}</ul>"


def _key_line(number: int | None) -> str:
    """Return a piece of the line with that number; "" for None."""
    if number is None:
        return ""
    dash = dashes(number)
    style = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        "<svg class=piece viewBox='0 0 24 8' aria-hidden=true>"
        f'<path class="line {colour_class(number)}" d="M0 4H24"{style}/></svg>'
    )


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
            f"<h3>{_key_line(number)}{escape(run)} <small>{_time(sum(parts.values()))}</small></h3>"
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


def _scale(samples: Sequence[SideBySide]) -> float:
    """Return the divergence in nats that is shaded fully, which few tokens exceed."""
    found = sorted(
        t.divergence for sample in samples for tokens in sample.shaded.values() for t in tokens
    )
    return (found[math.ceil(0.95 * len(found)) - 1] or 1.0) if found else 0.0


def _key(scale: float) -> str:
    if not scale:
        return ""
    return (
        "<p class=key>Paler is better. The run's divergence of student and teacher at each token: "
        f"0 <i></i> {format_number(scale)} nats or more. Point at a token, or tap it, for both "
        "distributions.</p>"
    )


def _side_by_side(sample: SideBySide, scale: float) -> str:
    cells = ""
    if sample.reference:
        cells = f"<div><h3>Reference</h3><pre>{escape(sample.reference)}</pre></div>"
    for name, tokens in sample.shaded.items():
        mean = sum(t.divergence for t in tokens) / max(len(tokens), 1)
        body = "".join(_token(token, scale) for token in tokens)
        number = sample.numbers.get(name)
        cells += (
            f"<div><h3>{_key_line(number)}{escape(name)} "
            f"<small>{format_number(mean)} nats a token</small></h3>"
            f'<pre class="{" ".join(["tokens", *_run_class(number)])}">{body}</pre></div>'
        )
    for name, (text, right) in sample.completions.items():
        mark = "passes" if right else "fails"
        cells += (
            f'<div class="{mark}"><h3>{_key_line(sample.numbers.get(name))}{escape(name)} '
            f"<em>{'✓' if right else '✗'} {mark}</em></h3>"
            f"<pre>{escape(text)}</pre></div>"
        )
    pairs = ' class="cells pairs"' if sample.shaded else " class=cells"  # before and after
    return f"<article><p>{escape(sample.prompt)}</p><div{pairs}>{cells}</div></article>"


def _token(token: Token, scale: float) -> str:
    """Return a shaded token, which shows its distributions while it is pointed at.

    A page has thousands of them, hence the short tags.
    """
    share = min(max(token.divergence, 0.0) / scale, 1.0)
    rows = "".join(
        f"<u>{escape(_visible(text))}</u><q>{_bar('t', teacher)}{_bar('s', student)}</q>"
        for text, teacher, student in sorted(
            token.support, key=lambda row: max(row[1] or 0.0, row[2]), reverse=True
        )
    )
    head = f"<strong>{escape(_visible(token.text))}</strong> {token.divergence:.3f} nats"
    return (
        f'<b tabindex=-1 style="--d:{share:.2f}">{escape(token.text) or "&#8203;"}'
        f"<span>{head}<s>{rows}</s></span></b>"
    )


def _bar(side: str, share: float | None) -> str:
    if share is None:
        return f"<a class={side}>in the tail</a>"
    return f'<a class={side} style="--p:{100 * share:.1f}%">{share:.3f}</a>'


def _visible(text: str) -> str:
    """Replace spaces, tabs and line ends by visible characters."""
    return text.replace("\n", "\u21b5").replace("\t", "\u21e5").replace(" ", "\u00b7")


# One colour says one thing: a run and its student have one of c0 to c5, teachers are grey (ct),
# green and red say right and wrong, and yellow is divergence.
_CSS = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#59636e;--paper:#fff;--panel:#f6f8fa;
--rule:#d1d9e0;--good:#1a7f37;--bad:#c0362c;--heat:232 176 0;--ct:#59636e;
--c0:#2563c9;--c1:#b85c06;--c2:#8a3ffc;--c3:#0b7285;--c4:#b3255c;--c5:#7a5230}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9aa4af;--paper:#0d1117;
--panel:#161b22;--rule:#30363d;--good:#4cc46b;--bad:#ff7b72;--heat:150 112 0;--ct:#9aa4af;
--c0:#6ea8fe;--c1:#f0a35e;--c2:#bc8cff;--c3:#3bc9db;--c4:#ff7eb6;--c5:#c9a27e}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1100px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.7rem;margin:0 0 4px;overflow-wrap:anywhere}h2{font-size:1.2rem;margin:40px 0 12px}
.lead{color:var(--soft);margin:0 0 20px}
.status{margin:0 0 20px;padding:8px 12px;background:var(--panel);border:1px solid var(--rule);
border-radius:8px}
.note{color:var(--soft);font-size:.85rem;line-height:1.4;margin:4px 0 8px}
:focus-visible{outline:2px solid var(--ink);outline-offset:1px}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%}
th,td{padding:8px 12px;text-align:right;border-bottom:1px solid var(--rule);vertical-align:top}
thead th{color:var(--soft);font-weight:600;vertical-align:bottom}
tbody th{font-weight:400;overflow-wrap:anywhere;min-width:8em}
th:first-child{text-align:left}
tr.best>*{font-weight:700;background:var(--panel)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(300px,100%),1fr));gap:20px}
figure{margin:0;padding:12px;background:var(--panel);border:1px solid var(--rule);border-radius:8px;
display:flex;flex-direction:column}
figure svg{margin-top:auto}
figcaption{font-weight:600}
svg{width:100%;height:auto;display:block}svg text{fill:var(--soft);font-size:12px}
svg.piece{display:inline-block;width:24px;height:8px;margin-right:6px;vertical-align:middle}
.grid{stroke:var(--rule);stroke-width:1}
.line{fill:none;stroke-width:2;stroke-linejoin:round}.piece .line{stroke-width:3}
td small{color:var(--soft);white-space:nowrap}code{font-size:.95em;white-space:nowrap}
tr,pre{--run:var(--soft)}
.n0{--run:var(--c0)}.n1{--run:var(--c1)}.n2{--run:var(--c2)}
.n3{--run:var(--c3)}.n4{--run:var(--c4)}.n5{--run:var(--c5)}
.range{display:block;position:relative;height:6px;margin-top:4px;min-width:120px;
background:var(--panel);border-radius:3px}
.range i{position:absolute;top:2px;height:2px;background:var(--run)}
.range b{position:absolute;width:6px;height:6px;margin-left:-3px;border-radius:3px;
background:var(--run)}
.line.ct{stroke:var(--ct)}.dot.ct{fill:var(--ct)}b.ct{background:var(--ct)}
.line.c0{stroke:var(--c0)}.line.c1{stroke:var(--c1)}.line.c2{stroke:var(--c2)}
.line.c3{stroke:var(--c3)}.line.c4{stroke:var(--c4)}.line.c5{stroke:var(--c5)}
.dot.c0{fill:var(--c0)}.dot.c1{fill:var(--c1)}.dot.c2{fill:var(--c2)}
.dot.c3{fill:var(--c3)}.dot.c4{fill:var(--c4)}.dot.c5{fill:var(--c5)}
b.c0{background:var(--c0)}b.c1{background:var(--c1)}b.c2{background:var(--c2)}
b.c3{background:var(--c3)}b.c4{background:var(--c4)}b.c5{background:var(--c5)}
ul{list-style:none;padding:0}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;margin:8px 0 0;font-size:.85rem;
color:var(--soft);overflow-wrap:anywhere}
.legend b{color:var(--ink)}
.times{margin:4px 0 16px}
.times li{display:grid;grid-template-columns:minmax(130px,200px) 1fr 130px;gap:2px 12px;
align-items:center}
.times i{height:12px}.times b{display:block;height:100%;min-width:1px;border-radius:2px}
.times small{color:var(--soft)}
article{border:1px solid var(--rule);border-radius:8px;padding:12px;margin-bottom:16px}
article p{margin:0 0 10px;font-weight:600;white-space:pre-wrap;overflow-wrap:anywhere}
.cells{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(240px,100%),1fr));gap:12px}
h3{font-size:.9rem;margin:0 0 4px;color:var(--soft);overflow-wrap:anywhere}
h3 em{font-style:normal;margin-left:.4em}h3 small{font-weight:400}
.passes em{color:var(--good)}.fails em{color:var(--bad)}
pre{margin:0;padding:10px;background:var(--panel);border-radius:6px;white-space:pre-wrap;
overflow-wrap:anywhere;font:13px/1.45 ui-monospace,"SF Mono",Consolas,monospace}
.key{color:var(--soft);font-size:.85rem}
.key i{display:inline-block;width:80px;height:10px;border-radius:2px;vertical-align:middle;
background:linear-gradient(90deg,transparent,rgb(var(--heat)/.75))}
.tokens{line-height:1.7}
.tokens b{font-weight:400;border-radius:2px;background:rgb(var(--heat)/calc(var(--d)*.75))}
.tokens b:hover,.tokens b:focus{outline:2px solid var(--ink)}
.tokens span{display:none}
.tokens b:hover>span,.tokens b:focus>span{display:block;position:fixed;z-index:1;right:16px;
bottom:16px;width:min(420px,calc(100vw - 32px));padding:12px;background:var(--paper);
border:1px solid var(--rule);border-radius:8px;box-shadow:0 4px 24px rgb(0 0 0/.3);
font:13px/1.3 system-ui,sans-serif}
.tokens s{display:grid;grid-template-columns:minmax(60px,auto) 1fr;gap:6px 10px;margin-top:8px;
text-decoration:none;align-items:center}
.tokens u{text-decoration:none;font-family:ui-monospace,monospace;overflow:hidden;
text-overflow:ellipsis;white-space:nowrap;max-width:130px}
.tokens q{quotes:none}
.tokens a{display:block;font-size:11px;padding-left:4px;margin-bottom:1px;
background:linear-gradient(var(--bar),var(--bar)) left/var(--p,0%) 100% no-repeat}
.tokens .t{--bar:color-mix(in srgb,var(--ct) 45%,transparent)}
.tokens .s{--bar:color-mix(in srgb,var(--run) 45%,transparent)}
.tokens .t:before{content:"teacher ";color:var(--soft)}
.tokens .s:before{content:"student ";color:var(--soft)}
@media(min-width:601px){.pairs{grid-template-columns:1fr 1fr}}
@media(max-width:600px){h2{margin-top:28px}
.times li{grid-template-columns:1fr auto}.times i{grid-row:2;grid-column:1/3}
table,tbody,tr,tbody th,td{display:block}
thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
tr{padding:8px 0;border-bottom:1px solid var(--rule)}
tbody th,td{border:0;padding:3px 8px;text-align:left}tbody th{font-weight:600}
td{display:grid;grid-template-columns:minmax(110px,40%) 1fr;gap:0 10px}
td:empty{display:none}td:before{content:attr(data-label);color:var(--soft)}
.range{grid-column:2;min-width:0}}
"""
