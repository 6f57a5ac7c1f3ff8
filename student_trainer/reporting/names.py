"""The names of what a run logs, by group: ``train/``, ``eval/``, ``teacher/`` and ``time/``.

`trainer_state.json`, JSON logs, TensorBoard and its like, and the report have the same names.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

GROUPS = ("train/", "eval/", "teacher/", "time/")
_UNGROUPED = ("step", "epoch")  # places on the axis, not measurements
_OTHER = {
    "train_loss": "train/mean_loss",  # of the whole run; a window's is train/loss
    "bytes_per_token": "teacher/bytes_per_token",
    "stall_fraction": "time/stall_fraction",
}
_PREFIXES = {"eval_": "eval/", "train_": "train/", "teacher_": "teacher/", "seconds_": "time/"}


def grouped(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry of the log with grouped names; one that has them already stays as it is.

    So the log of a run of an earlier version, whose names were ``loss``, ``eval_loss``,
    ``teacher_entropy`` and ``seconds_step``, is read like any other.
    """
    return {grouped_name(name): value for name, value in entry.items()}


@cache  # a report reads the same few names in each entry of the log
def grouped_name(name: str) -> str:
    """Return the name under its group: ``teacher_entropy`` is ``teacher/entropy``."""
    if name.startswith(GROUPS) or name in _UNGROUPED:
        return name
    if name in _OTHER:
        return _OTHER[name]
    for prefix, group in _PREFIXES.items():
        if name.startswith(prefix):
            return group + name.removeprefix(prefix)
    return f"train/{name}"
