"""Published files for tests, where they lie beside the checkout; tests skip where they do not."""

from pathlib import Path

import pytest

_DATA = Path(__file__).parents[3] / "shared" / "data"


def published(name: str) -> str:
    """Path of a published data file.

    HumanEval and GSM8K (both MIT) are not part of this repository.
    """
    path = _DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not beside this checkout")
    return str(path)
