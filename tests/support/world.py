"""A student, a teacher's folder, and rows to learn from and to be measured on."""

from __future__ import annotations

import json
import random
import string
from dataclasses import dataclass
from pathlib import Path

from tests.support.models import save_model, save_tokenizer


@dataclass(frozen=True)
class World:
    """The folders and files of a world, and the address of its teacher where it is served."""

    folder: Path
    url: str

    @property
    def student(self) -> Path:
        return self.folder / "student"

    @property
    def teacher(self) -> Path:
        return self.folder / "teacher"

    @property
    def rows(self) -> Path:
        return self.folder / "rows.jsonl"

    @property
    def held_out(self) -> Path:
        return self.folder / "held_out.jsonl"


def make_world(folder: Path) -> World:
    """Make a world of 48 rows, 16 held-out ones and a teacher not served, always the same."""
    for name, hidden_size, seed in (("student", 16, 1), ("teacher", 32, 2)):
        save_tokenizer(folder / name)
        save_model(folder / name, hidden_size=hidden_size, seed=seed)
    rng = random.Random(0)

    def text() -> str:
        return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 12)))

    for name, count in (("rows", 48), ("held_out", 16)):
        lines = [
            {"messages": [{"role": "user", "content": text()},
                          {"role": "assistant", "content": text()}]}
            for _ in range(count)
        ]  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return World(folder, url="")
