"""One teacher, one student, and rows to learn from, shared by all end-to-end tests."""

import json
import random
import string
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.support.models import save_model, save_tokenizer
from tests.support.server import running_server


@dataclass(frozen=True)
class World:
    """Folders and files, and the address of the teacher where it is served."""

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


@pytest.fixture(scope="session")
def unserved_world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
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


@pytest.fixture(scope="session")
def world(unserved_world):
    """Its teacher computes each sequence alone: in company, which is a matter of timing, it rounds
    otherwise, and runs are compared to the last bit."""
    with running_server(unserved_world.teacher, "--max-batch-tokens", "1") as url:
        yield replace(unserved_world, url=url)
