"""The lines that a run writes for people, made of what it logs under `reporting.names`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SEPARATOR = " · "
# What `held_out_line` shows first; scores of checkers follow under their own names.
_HELD_OUT_FIRST = ("divergence", "loss")
_COSTS = ("runtime", "samples_per_second", "steps_per_second")


def window_line(
    metrics: Mapping[str, Any],
    *,
    step: int,
    steps: int,
    seconds_left: float | None = None,
    width: int | None = None,
) -> str:
    """Return the line of a logging window, without what its method does not measure.

    Args:
        metrics: grouped names and values.
        seconds_left: of the run; None where it is over or not known.
        width: columns that the line may take; None for any number. What matters least is left out.
    """
    loss, divergence = metrics.get("train/loss"), metrics.get("train/divergence")
    wait = metrics.get("time/stall_fraction")
    parts = [  # how early a part is left out (0: never), and its text
        (0, f"step {step}/{steps}"),
        (4, _text("{} s/step", metrics.get("time/step"), _seconds)),
        (3, _text("{} left", seconds_left, readable_seconds)),
        (6 if divergence is not None else 0, _text("loss {}", loss, number)),
        (0, _text("divergence {}", divergence, number)),
        (6, _by_teacher(metrics, "train/divergence")),
        (7, _text("top-1 {}", metrics.get("train/top1_agreement"), _share)),
        (8, _text("length {}", metrics.get("train/completion_length"), "{:.0f}".format)),
        (5, _text("teacher wait {}", wait, "{:.0%}".format).replace("%", " %")),
        (1, _text("{} not finite, skipped", metrics.get("train/skipped_steps"), str)),
    ]
    return _fitted(parts, width)


def held_out_line(
    metrics: Mapping[str, Any], *, step: int, steps: int, width: int | None = None
) -> str:
    """Return the line of an evaluation on held-out rows; arguments as in `window_line`."""
    found = {
        name.removeprefix("eval/"): value
        for name, value in metrics.items()
        if name.startswith("eval/") and name.removeprefix("eval/") not in _COSTS
    }
    if "divergence" in found:
        found.pop("loss", None)  # the same number
    found = {name: value for name, value in found.items() if "/" not in name}
    names = [*(n for n in _HELD_OUT_FIRST if n in found), *found.keys() - {*_HELD_OUT_FIRST}]
    nats = [name for name in names if name == "loss" or "divergence" in name]
    order = sorted(names, key=lambda n: (n not in _HELD_OUT_FIRST, n in nats, n))
    scores = [
        f"{name.replace('_', ' ')} {(number if name in nats else _share)(found[name])}"
        for name in order
    ]
    scores.insert(1, _by_teacher(metrics, "eval/divergence"))
    took = _text("{}", metrics.get("eval/runtime"), readable_seconds)
    parts = [
        (0, f"step {step}/{steps}"),
        (0, "held out"),
        *enumerate(scores),
        (len(scores) + 1, took),
    ]
    return _fitted(parts, width)


def _by_teacher(metrics: Mapping[str, Any], name: str) -> str:
    """Return a quantity of each of several teachers: ``math .051, code .043``."""
    found = {key: value for key, value in metrics.items() if key.startswith(f"{name}/")}
    return ", ".join(f"{key.removeprefix(name + '/')} {number(v)}" for key, v in found.items())


def number(value: float) -> str:
    """Return a number in three digits, without the zero before its point."""
    text = f"{value:.0f}" if 999.5 <= abs(value) < 1e6 else f"{value:.3g}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def readable_seconds(seconds: float) -> str:
    """Return a duration in the unit that suits it: 0.3 s, 42 s, 7 min, 3 h 05 min."""
    if seconds < 9.5:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _seconds(value: float) -> str:
    return f"{value:.0f}" if value >= 9.5 else f"{value:.2g}"


def _share(value: float) -> str:
    text = f"{value:.2f}"
    return text[1:] if text.startswith("0.") else text


def _text(form: str, value: Any, written: Any) -> str:
    return "" if value is None else form.format(written(value))


def _fitted(parts: Sequence[tuple[int, str]], width: int | None) -> str:
    """Join the parts that are not empty; those of the highest numbers go until the rest fits."""
    kept = [part for part in parts if part[1]]
    while True:
        line = SEPARATOR.join(text for _, text in kept)
        first = max(kept)[0]
        if width is None or len(line) <= width or first == 0:
            return line
        kept = [part for part in kept if part[0] != first]
