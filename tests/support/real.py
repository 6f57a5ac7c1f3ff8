"""The published tokenizers and models; tests that need a missing one are skipped.

`make real-models` fetches them. `REAL_MODELS` names another folder than the default.
"""

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("REAL_MODELS") or Path.home() / ".cache" / "real-models")
TOKENIZERS = ("qwen3", "llama3_1", "deepseek_v3", "gemma3", "gptoss")


def tokenizer_folder(name: str) -> Path:
    """Return the folder of a published tokenizer: one of `TOKENIZERS`."""
    return _folder(FOLDER / "tokenizers" / name, "tokenizer.json")


def model_folder(name: str) -> Path:
    """Return the folder of a published model: gemma-3-270m or qwen2.5-coder-0.5b."""
    return _folder(FOLDER / name, "config.json")


def _folder(path: Path, file: str) -> Path:
    if not (path / file).exists():
        pytest.skip(f"{path} is not there; `make real-models` fetches it")
    return path
