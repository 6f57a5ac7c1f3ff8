"""Texts of code, arithmetic and prose as prompts and completions in a model's tokens.

The files are published ones, in a folder: HumanEval.jsonl.gz, gsm8k_train.jsonl and
gsm8k_test.jsonl. The prose is this project's own documentation.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
KINDS = ("code", "arithmetic", "prose")


@dataclass(frozen=True)
class Text:
    """A prompt and its completion, both as token ids and not empty."""

    kind: str
    prompt: list[int]
    completion: list[int]


def read_texts(
    folder: Path, tokenizer: Any, count: int, *, prompt_tokens: int, completion_tokens: int
) -> list[Text]:
    """Return the first ``count`` texts of each kind, cut to so many tokens; long prompts in front.

    Raises:
        OSError: a file is missing.
    """
    sources = {"code": _code(folder), "arithmetic": _arithmetic(folder / "gsm8k_test.jsonl"),
               "prose": _prose()}  # fmt: skip
    return [
        Text(
            kind,
            tokenizer(prompt).input_ids[-prompt_tokens:],
            tokenizer(completion, add_special_tokens=False).input_ids[:completion_tokens],
        )
        for kind, pairs in sources.items()
        for prompt, completion in islice(pairs, count)
    ]


def training_texts(
    folder: Path, tokenizer: Any, count: int, *, prompt_tokens: int, completion_tokens: int
) -> list[Text]:
    """Return ``count`` texts of arithmetic to train on, none of which `read_texts` returns."""
    return [
        Text(
            "arithmetic",
            tokenizer(prompt).input_ids[-prompt_tokens:],
            tokenizer(completion, add_special_tokens=False).input_ids[:completion_tokens],
        )
        for prompt, completion in islice(_arithmetic(folder / "gsm8k_train.jsonl"), count)
    ]


def _code(folder: Path) -> Iterator[tuple[str, str]]:
    with gzip.open(folder / "HumanEval.jsonl.gz", "rt") as lines:
        for line in lines:
            row = json.loads(line)
            yield row["prompt"], row["canonical_solution"]


def _arithmetic(file: Path) -> Iterator[tuple[str, str]]:
    for line in file.read_text().splitlines():
        row = json.loads(line)
        yield f"Question: {row['question']}\nAnswer:", " " + row["answer"]


def _prose() -> Iterator[tuple[str, str]]:
    """Yield paragraphs of the documentation, cut in the middle."""
    for page in sorted(DOCS.glob("*/*.md")):
        for paragraph in page.read_text().split("\n\n"):
            words = paragraph.split()
            if len(words) > 60 and words[0][0].isalpha():
                yield " ".join(words[:30]), " " + " ".join(words[30:])
