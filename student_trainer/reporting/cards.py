"""Draw samples as cards: what each model wrote, and texts token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from student_trainer.reporting.axes import format_number
from student_trainer.reporting.content import SideBySide, Token
from student_trainer.reporting.svg import colour_class, dashes


def key_line(number: int | None) -> str:
    """Return a piece of the line with that number; "" for None."""
    if number is None:
        return ""
    dash = dashes(number)
    style = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        "<svg class=piece viewBox='0 0 24 8' aria-hidden=true>"
        f'<path class="line {colour_class(number)}" d="M0 4H24"{style}/></svg>'
    )


def run_class(number: int | None) -> list[str]:
    """Return the class under which ``--run`` is the colour of a run."""
    return [] if number is None else [f"n{number % 6}"]


def heat_scale(samples: Sequence[SideBySide]) -> float:
    """Return the divergence in nats that is shaded fully, which few tokens exceed."""
    found = sorted(
        t.divergence for sample in samples for tokens in sample.shaded.values() for t in tokens
    )
    return (found[math.ceil(0.95 * len(found)) - 1] or 1.0) if found else 0.0


def heat_key(scale: float) -> str:
    if not scale:
        return ""
    return (
        "<p class=key>Paler is better. The run's divergence of student and teacher at each token: "
        f"0 <i></i> {format_number(scale)} nats or more. Point at a token, or tap it, for both "
        "distributions.</p>"
    )


def side_by_side(sample: SideBySide, scale: float) -> str:
    cells = ""
    if sample.reference:
        cells = f"<div><h3>Reference</h3><pre>{escape(sample.reference)}</pre></div>"
    for name, tokens in sample.shaded.items():
        mean = sum(t.divergence for t in tokens) / max(len(tokens), 1)
        body = "".join(_token(token, scale) for token in tokens)
        number = sample.numbers.get(name)
        cells += (
            f"<div><h3>{key_line(number)}{escape(name)} "
            f"<small>{format_number(mean)} nats a token</small></h3>"
            f'<pre class="{" ".join(["tokens", *run_class(number)])}">{body}</pre></div>'
        )
    for name, (text, right) in sample.completions.items():
        mark = "passes" if right else "fails"
        cells += (
            f'<div class="{mark}"><h3>{key_line(sample.numbers.get(name))}{escape(name)} '
            f"<em>{'✓' if right else '✗'} {mark}</em></h3>"
            f"<pre>{escape(text)}</pre></div>"
        )
    count = len(sample.shaded) + len(sample.completions) + bool(sample.reference)
    in_pairs = sample.shaded or count == 4  # before and after; and of four, none stands alone
    pairs = ' class="cells pairs"' if in_pairs else " class=cells"
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
