"""What a run looked like, for eyes: one self-contained HTML page without scripts or network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from student_trainer.svg import ticks

Point = tuple[float, float]


@dataclass(frozen=True)
class Chart:
    """Lines over training steps: name -> (step, value) points."""

    title: str
    y_label: str
    series: Mapping[str, Sequence[Point]]


@dataclass(frozen=True)
class Table:
    """A header and rows of text; the row of index ``best`` is set off."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: int | None = None


@dataclass(frozen=True)
class SideBySide:
    """One prompt, what was wanted, and what each model wrote: name -> (text, right or wrong)."""

    prompt: str
    reference: str
    completions: Mapping[str, tuple[str, bool]]


@dataclass(frozen=True)
class Report:
    """Everything on the page, top to bottom.

    Attributes:
        title: of the page.
        lead: one or two sentences under it.
        table: the comparison.
        charts: curves.
        seconds: run -> part -> seconds, drawn as one stacked bar a run.
        samples: completions side by side.
        commands: how to repeat the run.
    """

    title: str
    lead: str
    table: Table
    charts: Sequence[Chart] = ()
    seconds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    samples: Sequence[SideBySide] = ()
    commands: Sequence[str] = ()


def render(report: Report) -> str:
    """The page, as one HTML document."""
    sections = [
        f"<h1>{escape(report.title)}</h1><p class=lead>{escape(report.lead)}</p>",
        _table(report.table),
    ]
    if report.charts:
        figures = "".join(_chart(chart) for chart in report.charts)
        sections.append(f"<h2>Training</h2><div class=charts>{figures}</div>")
    if report.seconds:
        sections.append(f"<h2>Where the time went</h2>{_time_bars(report.seconds)}")
    if report.samples:
        cards = "".join(_side_by_side(sample) for sample in report.samples)
        sections.append(f"<h2>Completions side by side</h2>{cards}")
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
    rows = "".join(
        f"<tr{' class=best' if i == table.best else ''}>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row)
        + "</tr>"
        for i, row in enumerate(table.rows)
    )
    body = f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
    return f"<div class=scroll><table>{body}</table></div>"


_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 420, 240, 48, 12, 12, 28


def _chart(chart: Chart) -> str:
    points = [p for line in chart.series.values() for p in line if math.isfinite(p[1])]
    if not points:
        return ""
    x_low, x_high = _range([x for x, _ in points])
    y_low, y_high = _range([y for _, y in points])

    def place(x: float, y: float) -> Point:
        across = (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        up = (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
        return _LEFT + across, _HEIGHT - _BOTTOM - up

    parts = []
    for tick in ticks(y_low, y_high):
        y = place(x_low, tick)[1]
        parts.append(
            f"<line class=grid x1={_LEFT} x2={_WIDTH - _RIGHT} y1={y:.1f} y2={y:.1f} />"
            f"<text x={_LEFT - 6} y={y + 4:.1f} text-anchor=end>{tick:g}</text>"
        )
    for tick in ticks(x_low, x_high):
        x = place(tick, y_low)[0]
        parts.append(f"<text x={x:.1f} y={_HEIGHT - 8} text-anchor=middle>{tick:g}</text>")
    for number, line in enumerate(chart.series.values()):
        where = (place(x, y) for x, y in line if math.isfinite(y))
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in where)
        parts.append(f'<polyline class="line c{number % 6}" points="{path}" />')
    return (
        f"<figure><figcaption>{escape(chart.title)} <span>{escape(chart.y_label)}</span>"
        f"</figcaption><svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role=img "
        f'aria-label="{escape(chart.title)}">{"".join(parts)}</svg>'
        f"{_legend(list(chart.series))}</figure>"
    )


def _range(values: Sequence[float]) -> Point:
    low, high = min(values), max(values)
    if low == high:
        return low - 0.5, high + 0.5
    return low, high


def _legend(names: Sequence[str]) -> str:
    items = "".join(
        f'<li><i class="c{i % 6}"></i>{escape(name)}</li>' for i, name in enumerate(names)
    )
    return f"<ul class=legend>{items}</ul>"


def _time_bars(seconds: Mapping[str, Mapping[str, float]]) -> str:
    """One stacked bar a run, on one scale, each with the legend of its own parts."""
    longest = max(sum(run.values()) for run in seconds.values()) or 1.0
    rows = []
    for run, parts in seconds.items():
        bars = "".join(
            f'<b class="c{i % 6}" style="width:{100 * value / longest:.2f}%" '
            f'title="{escape(name)}: {value:.1f} s"></b>'
            for i, (name, value) in enumerate(parts.items())
        )
        legend = _legend([f"{name} {value:.1f} s" for name, value in parts.items()])
        rows.append(
            f"<div class=run><span>{escape(run)}</span><div class=bar>{bars}</div>{legend}</div>"
        )
    return f"<div class=times>{''.join(rows)}</div>"


def _side_by_side(sample: SideBySide) -> str:
    cells = f"<div><h3>Reference</h3><pre>{escape(sample.reference)}</pre></div>"
    for name, (text, right) in sample.completions.items():
        mark = "passes" if right else "fails"
        cells += (
            f'<div class="{mark}"><h3>{escape(name)} <em>{mark}</em></h3>'
            f"<pre>{escape(text)}</pre></div>"
        )
    return f"<article><p>{escape(sample.prompt)}</p><div class=cells>{cells}</div></article>"


_CSS = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#59636e;--paper:#fff;--panel:#f6f8fa;
--rule:#d1d9e0;--good:#1a7f37;--bad:#c0362c;
--c0:#2563c9;--c1:#c8650a;--c2:#1a7f37;--c3:#8a3ffc;--c4:#b3255c;--c5:#0b7285}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9aa4af;--paper:#0d1117;
--panel:#161b22;--rule:#30363d;--good:#4cc46b;--bad:#ff7b72;
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
figcaption{font-weight:600}figcaption span{color:var(--soft);font-weight:400}
svg{width:100%;height:auto;display:block}svg text{fill:var(--soft);font-size:11px}
.grid{stroke:var(--rule);stroke-width:1}
.line{fill:none;stroke-width:2;stroke-linejoin:round}
.line.c0{stroke:var(--c0)}.line.c1{stroke:var(--c1)}.line.c2{stroke:var(--c2)}
.line.c3{stroke:var(--c3)}.line.c4{stroke:var(--c4)}.line.c5{stroke:var(--c5)}
i.c0,b.c0{background:var(--c0)}i.c1,b.c1{background:var(--c1)}i.c2,b.c2{background:var(--c2)}
i.c3,b.c3{background:var(--c3)}i.c4,b.c4{background:var(--c4)}i.c5,b.c5{background:var(--c5)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 16px;padding:0;margin:8px 0 0;
font-size:.85rem;color:var(--soft)}
.legend i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:6px}
.run{display:grid;grid-template-columns:minmax(90px,160px) 1fr;gap:2px 12px;align-items:center;
margin-bottom:10px}
.run .legend{grid-column:2;margin:2px 0 8px}
.bar{display:flex;height:18px;background:var(--panel);border-radius:4px;overflow:hidden}
.bar b{display:block;height:100%}
article{border:1px solid var(--rule);border-radius:8px;padding:12px;margin-bottom:16px}
article p{margin:0 0 10px;font-weight:600;white-space:pre-wrap}
.cells{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(290px,100%),1fr));gap:12px}
h3{font-size:.9rem;margin:0 0 4px;color:var(--soft)}
h3 em{font-style:normal;font-weight:700}
.passes em{color:var(--good)}.fails em{color:var(--bad)}
pre{margin:0;padding:10px;background:var(--panel);border-radius:6px;white-space:pre-wrap;
overflow-wrap:anywhere;font:13px/1.45 ui-monospace,"SF Mono",Consolas,monospace}
"""
