"""The folder that an experiment's data, tokenizer and untrained models are written to."""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from examples.mini_humaneval.models import ModelShape, build_model, save, train_tokenizer

Row = dict[str, Any]


def run(prepare: Callable[..., None], doc: str | None) -> None:
    """Call ``prepare(folder, seed=...)`` by the arguments of the command line.

    Args:
        doc: the module's docstring, whose first paragraph is the help.
    """
    parser = argparse.ArgumentParser(description=(doc or "").split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    prepare(arguments.output_dir, seed=arguments.seed)


def write_rows(folder: Path, files: Mapping[str, Iterable[Row]]) -> None:
    """Make the folder, and write a JSONL file for each name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def write_models(
    folder: Path,
    rows: Iterable[Row],
    shapes: Mapping[str, ModelShape],
    *,
    vocabulary_size: int,
    max_length: int,
    seed: int,
) -> None:
    """Write an untrained model for each name, all with a tokenizer of the rows' messages.

    Args:
        seed: of the first model; each other one has the next.
    """
    tokenizer = train_tokenizer(
        (message["content"] for row in rows for message in row["messages"]),
        vocabulary_size=vocabulary_size,
        max_length=max_length,
    )
    for offset, (name, shape) in enumerate(shapes.items()):
        model = build_model(tokenizer, shape, max_length=max_length, seed=seed + offset)
        save(model, tokenizer, folder / name)
