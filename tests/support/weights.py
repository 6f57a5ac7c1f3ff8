"""The comparison of two models' weights, bit by bit."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file


def different_weights(a: Path, b: Path, file: str = "model.safetensors") -> list[str]:
    """Return the names of weights that differ in a bit, or that only one of two models has."""
    one, two = load_file(a / file), load_file(b / file)
    return [
        name
        for name in sorted(one.keys() | two.keys())
        if name not in one
        or name not in two
        or not torch.equal(one[name].view(torch.uint8), two[name].view(torch.uint8))
    ]
