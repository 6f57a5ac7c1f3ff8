"""The messages that the troubleshooting page explains are those that the programs print."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "how-to" / "troubleshooting.md").read_text()
MESSAGES = re.findall(r"^\*\*`(.+)`\*\*$", PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def sources():
    """All code, its adjacent literals joined, and a `…` for each value that is put in."""
    folders = ("shared", "student_trainer", "teacher_server")
    code = "\n".join(p.read_text() for f in folders for p in sorted((ROOT / f).rglob("*.py")))
    joined = re.sub(r'"\s*\n\s*f?"', "", code)
    return re.sub(r"\{[^{}]*\}|%\.0f|%[srd]", "…", joined)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_in_the_sources(message, sources):
    parts = [part.strip() for part in message.split("…")]
    assert len(max(parts, key=len)) >= 10  # else any text would do
    assert [part for part in parts if part not in sources] == []
