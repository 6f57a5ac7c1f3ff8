"""The findings of `student-trainer doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# "off" stands for something that is neither there nor needed.
Status = Literal["ok", "warn", "fail", "off"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        remedy: what to do, or empty.
    """

    check: str
    status: Status
    detail: str
    remedy: str = ""
