"""The messages that the FAQ and the troubleshooting page explain are those that programs print."""

import re
from pathlib import Path

import pytest

from student_trainer.commands.main import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs" / "how-to" / name for name in ("faq.md", "troubleshooting.md")]
MESSAGES = [
    message
    for page in PAGES
    for message in re.findall(r"^\*\*`+(.+?)`+\*\*$", page.read_text(), re.MULTILINE)
]
# Printed of every flag that needs another one, of teachers with a name, and of weights that are
# missing too; the page shows one.
FILLED_IN = {
    "--lora_r has no effect without --use_peft": "--… has no effect without …",
    "Waiting for the teacher at …: it …; … s left": "Waiting for … at …: it …; … s left",
    "… weights are not what was saved, … among them": "… weights …, … among them, so it is not",
}


@pytest.fixture(scope="module")
def sources():
    """All code, its adjacent literals joined, and a `…` for each value that is put in."""
    folders = ("shared", "student_trainer", "teacher_server")
    code = "\n".join(p.read_text() for f in folders for p in sorted((ROOT / f).rglob("*.py")))
    joined = re.sub(r'"\s*\n\s*f?"', "", code)
    return re.sub(r"\{[^{}]*\}|%\.0f|%[srd]", "…", joined)


def test_the_message_that_is_filled_in_is_printed(capsys):
    words = ["--model_name_or_path", "org/m", "--dataset_name", "d.jsonl", "--output_dir", "out"]
    assert main(["sft", *words, "--lora_r", "8"]) == 2
    assert "--lora_r has no effect without --use_peft" in capsys.readouterr().err


def test_each_page_has_messages():
    assert len(MESSAGES) > 50


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_in_the_sources(message, sources):
    parts = [part.strip() for part in FILLED_IN.get(message, message).split("…")]
    assert len(max(parts, key=len)) >= 10  # else any text would do
    assert [part for part in parts if part not in sources] == []
