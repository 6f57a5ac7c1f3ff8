"""`evaluate`: a model's own completions, checked; numbers into results.json."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from shared.errors import ConfigurationError

logger = logging.getLogger(__name__)


def evaluate(argv: Sequence[str]) -> dict[str, Any]:
    """Generate for every row that carries a checker, run the checkers, print and save the score."""
    raise ConfigurationError("to be written once the suites are there")
