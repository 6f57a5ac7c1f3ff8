"""The published data files beside the checkout; tests that need a missing one are skipped."""

from pathlib import Path

import pytest

_DATA = Path(__file__).parents[3] / "shared" / "data"


def published(name: str) -> str:
    """Return the path of a published data file, or skip the test.

    HumanEval and GSM8K (both MIT) are not part of this repository.
    """
    path = _DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not beside this checkout")
    return str(path)
