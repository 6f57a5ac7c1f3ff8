"""Render runs as one self-contained HTML page without scripts or network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from student_trainer.reporting.svg import LINES_SIZE, Point, draw_lines


@dataclass(frozen=True)
class Chart:
    """A chart of lines, name -> (x, y) points."""

    title: str
    y_label: str
    series: Mapping[str, Sequence[Point]]
    x_label: str = "step"


@dataclass(frozen=True)
class Range:
    """A value with its interval, written and drawn on the scale of its column."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Table:
    """A header and rows of text and intervals; the row of index ``best`` is highlighted."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | Range]]
    best: int | None = None


@dataclass(frozen=True)
class SideBySide:
    """A prompt, its reference ("" if unknown), and what each model wrote.

    Attributes:
        completions: name -> (text, right or wrong).
        shaded: name -> the tokens of one text, with the divergence of that model from its teacher.
    """

    prompt: str
    reference: str
    completions: Mapping[str, tuple[str, bool]]
    shaded: Mapping[str, Sequence[Token]] = field(default_factory=dict)


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
        seconds: run -> part -> seconds, drawn as one stacked bar a run.
        samples: completions side by side.
        commands: how to repeat the run.
    """

    title: str
    lead: str
    tables: Mapping[str, Table]
    charts: Sequence[Chart] = ()
    seconds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    samples: Sequence[SideBySide] = ()
    commands: Sequence[str] = ()


def render(report: Report) -> str:
    """Return the page as one HTML document."""
    sections = [
        f"<h1>{escape(report.title)}</h1><p class=lead>{escape(report.lead)}</p>",
        *(
            (f"<h2>{escape(title)}</h2>" if title else "") + _table(table)
            for title, table in report.tables.items()
        ),
    ]
    if report.charts:
        figures = "".join(_chart(chart) for chart in report.charts)
        sections.append(f"<h2>Curves</h2><div class=charts>{figures}</div>")
    if report.seconds:
        sections.append(f"<h2>Where the time went</h2>{_time_bars(report.seconds)}")
    if report.samples:
        scale = _scale(report.samples)
        cards = "".join(_side_by_side(sample, scale) for sample in report.samples)
        sections.append(f"<h2>Completions side by side</h2>{_key(scale)}{cards}")
    if report.commands:
        lines = escape("\n".join(report.commands))
        sections.append(f"<h2>Commands</h2><pre class=commands>{lines}</pre>")
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.title)}</title><style>{_CSS}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.columns)
    scales = [_column_scale(column) for column in zip(*table.rows, strict=True)]
    rows = "".join(
        f"<tr{' class=best' if i == table.best else ''}>"
        + "".join(f"<td>{_cell(cell, s)}</td>" for cell, s in zip(row, scales, strict=True))
        + "</tr>"
        for i, row in enumerate(table.rows)
    )
    body = f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
    return f"<div class=scroll><table>{body}</table></div>"


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
        f"{cell.value:.3f} <small>{cell.low:.3f} to {cell.high:.3f}</small>"
        f'<span class=range><i style="left:{start:.1f}%;width:{end - start:.1f}%"></i>'
        f'<b style="left:{percent(cell.value):.1f}%"></b></span>'
    )


def _chart(chart: Chart) -> str:
    drawn = draw_lines(chart.series, chart.x_label, chart.y_label)
    if not drawn:
        return ""
    width, height = LINES_SIZE
    return (
        f"<figure><figcaption>{escape(chart.title)}</figcaption>"
        f"<svg viewBox='0 0 {width} {height}' role=img "
        f'aria-label="{escape(chart.title)}">{drawn}</svg>'
        f"{_chart_legend(chart)}</figure>"
    )


def _chart_legend(chart: Chart) -> str:
    """Return the legend of a chart, or "" where there is one line only."""
    if len(chart.series) == 1:
        return ""
    return _legend({name: i for i, (name, line) in enumerate(chart.series.items()) if line})


def _legend(numbers: Mapping[str, int]) -> str:
    """Return a legend of names by the number of their colour; high numbers are dashed."""
    items = "".join(
        f'<li><i class="c{i % 6}{" dashed" if i >= 6 else ""}"></i>{escape(name)}</li>'
        for name, i in numbers.items()
    )
    return f"<ul class=legend>{items}</ul>"


def _time_bars(seconds: Mapping[str, Mapping[str, float]]) -> str:
    """Return one stacked bar a run, on one scale, each with the legend of its own parts."""
    names = dict.fromkeys(name for run in seconds.values() for name in run)
    numbers = {name: number for number, name in enumerate(names)}
    longest = max(sum(run.values()) for run in seconds.values()) or 1.0
    rows = []
    for run, parts in seconds.items():
        bars = "".join(
            f'<b class="c{numbers[name] % 6}" style="width:{100 * value / longest:.2f}%" '
            f'title="{escape(name)}: {_time(value)}"></b>'
            for name, value in parts.items()
        )
        legend = _legend({f"{name} {_time(s)}": numbers[name] for name, s in parts.items()})
        rows.append(
            f"<div class=run><span>{escape(run)} <small>{_time(sum(parts.values()))}</small></span>"
            f"<div class=bar>{bars}</div>{legend}</div>"
        )
    return f"<div class=times>{''.join(rows)}</div>"


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
        "<p class=key>The run's divergence of student and teacher at each token: 0 <i></i> "
        f"{scale:.2g} nats or more. Point at a token, or tap it, for both distributions.</p>"
    )


def _side_by_side(sample: SideBySide, scale: float) -> str:
    cells = ""
    if sample.reference:
        cells = f"<div><h3>Reference</h3><pre>{escape(sample.reference)}</pre></div>"
    for name, tokens in sample.shaded.items():
        mean = sum(t.divergence for t in tokens) / max(len(tokens), 1)
        body = "".join(_token(token, scale) for token in tokens)
        cells += (
            f"<div><h3>{escape(name)} <small>{mean:.3f} nats a token</small></h3>"
            f"<pre class=tokens>{body}</pre></div>"
        )
    for name, (text, right) in sample.completions.items():
        mark = "passes" if right else "fails"
        cells += (
            f'<div class="{mark}"><h3>{escape(name)} <em>{mark}</em></h3>'
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


_CSS = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#59636e;--paper:#fff;--panel:#f6f8fa;
--rule:#d1d9e0;--good:#1a7f37;--bad:#c0362c;
--heat:200 70 20;--teacher:37 99 201;--student:200 101 10;
--c0:#2563c9;--c1:#c8650a;--c2:#1a7f37;--c3:#8a3ffc;--c4:#b3255c;--c5:#0b7285}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9aa4af;--paper:#0d1117;
--panel:#161b22;--rule:#30363d;--good:#4cc46b;--bad:#ff7b72;
--heat:255 120 60;--teacher:110 168 254;--student:240 163 94;
--c0:#6ea8fe;--c1:#f0a35e;--c2:#56d364;--c3:#bc8cff;--c4:#ff7eb6;--c5:#3bc9db}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1100px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.7rem;margin:0 0 4px}h2{font-size:1.2rem;margin:40px 0 12px}
.lead{color:var(--soft);margin:0 0 20px}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%}
th,td{padding:8px 12px;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}
th{color:var(--soft);font-weight:600}
th:first-child,td:first-child{text-align:left}
tr.best td{font-weight:700;background:var(--panel)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(290px,1fr));gap:20px}
figure{margin:0;padding:12px;background:var(--panel);border:1px solid var(--rule);border-radius:8px}
figcaption{font-weight:600}
svg{width:100%;height:auto;display:block}svg text{fill:var(--soft);font-size:12px}
.grid{stroke:var(--rule);stroke-width:1}
.line{fill:none;stroke-width:2;stroke-linejoin:round}
td small{color:var(--soft)}
.range{display:block;position:relative;height:6px;margin-top:4px;min-width:120px;
background:var(--panel);border-radius:3px}
.range i{position:absolute;top:2px;height:2px;background:var(--c0)}
.range b{position:absolute;width:6px;height:6px;margin-left:-3px;border-radius:3px;
background:var(--c0)}
.line.c0{stroke:var(--c0)}.line.c1{stroke:var(--c1)}.line.c2{stroke:var(--c2)}
.line.c3{stroke:var(--c3)}.line.c4{stroke:var(--c4)}.line.c5{stroke:var(--c5)}
.dot.c0{fill:var(--c0)}.dot.c1{fill:var(--c1)}.dot.c2{fill:var(--c2)}
.dot.c3{fill:var(--c3)}.dot.c4{fill:var(--c4)}.dot.c5{fill:var(--c5)}
i.c0,b.c0{background:var(--c0)}i.c1,b.c1{background:var(--c1)}i.c2,b.c2{background:var(--c2)}
i.c3,b.c3{background:var(--c3)}i.c4,b.c4{background:var(--c4)}i.c5,b.c5{background:var(--c5)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 16px;padding:0;margin:8px 0 0;
font-size:.85rem;color:var(--soft)}
.legend i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:6px}
.legend .dashed{clip-path:polygon(0 0,35% 0,35% 100%,65% 100%,65% 0,100% 0,100% 100%,0 100%)}
.run small{display:block;color:var(--soft)}
.run{display:grid;grid-template-columns:minmax(90px,160px) 1fr;gap:2px 12px;align-items:center;
margin-bottom:10px}
.run .legend{grid-column:2;margin:2px 0 8px}
.bar{display:flex;height:18px;background:var(--panel);border-radius:4px;overflow:hidden}
.bar b{display:block;height:100%}
article{border:1px solid var(--rule);border-radius:8px;padding:12px;margin-bottom:16px}
article p{margin:0 0 10px;font-weight:600;white-space:pre-wrap}
.cells{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(290px,100%),1fr));gap:12px}
h3{font-size:.9rem;margin:0 0 4px;color:var(--soft)}
h3 em{font-style:normal;margin-left:.4em}h3 small{font-weight:400}
.passes em{color:var(--good)}.fails em{color:var(--bad)}
pre{margin:0;padding:10px;background:var(--panel);border-radius:6px;white-space:pre-wrap;
overflow-wrap:anywhere;font:13px/1.45 ui-monospace,"SF Mono",Consolas,monospace}
.key{color:var(--soft);font-size:.85rem}
.key i{display:inline-block;width:80px;height:10px;border-radius:2px;vertical-align:middle;
background:linear-gradient(90deg,transparent,rgb(var(--heat)/.75))}
.tokens{line-height:1.7}
.tokens b{font-weight:400;border-radius:2px;background:rgb(var(--heat)/calc(var(--d)*.75))}
.tokens b:hover,.tokens b:focus{outline:2px solid var(--c0)}
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
.tokens .t{--bar:rgb(var(--teacher)/.45)}.tokens .s{--bar:rgb(var(--student)/.45)}
.tokens .t:before{content:"teacher ";color:var(--soft)}
.tokens .s:before{content:"student ";color:var(--soft)}
@media(min-width:601px){.pairs{grid-template-columns:1fr 1fr}}
@media(max-width:600px){th,td{padding:6px 8px}.run{grid-template-columns:1fr}
.run .legend{grid-column:1}h2{margin-top:28px}.range{min-width:90px}}
"""
