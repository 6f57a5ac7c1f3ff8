"""Links between pages lead to files that a clone has."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.support.repository import ROOT, files, pages

_LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)")


def broken(root: Path) -> list[str]:
    """Return the relative links that lead to no file or folder of the repository."""
    there = files(root)
    folders = {str(parent) for file in there for parent in Path(file).parents}
    return [
        f"{page}: {target}"
        for page in pages(root)
        for target in _LINK.findall((root / page).read_text(encoding="utf-8"))
        for found in [(root / page).parent.joinpath(target).resolve().relative_to(root)]
        if str(found) not in there | folders
    ]


def test_each_relative_link_leads_to_a_file_of_the_repository():
    assert pages()
    assert broken(ROOT) == []


@pytest.mark.parametrize("git", [True, False], ids=["clone", "sdist"])
def test_a_file_that_git_does_not_track_is_no_target_in_a_clone(tmp_path, git):
    root = tmp_path.resolve()
    for name, text in {
        "docs/page.md": "[a](../tracked.py) [b](new.md) [c](../nowhere.md) [d](../docs)",
        "docs/new.md": "",
        "tracked.py": "",
    }.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    if git:
        for words in (["init", "--quiet"], ["add", "docs/page.md", "tracked.py"]):
            subprocess.run(["git", *words], cwd=root, check=True)
    missing = ["new.md", "../nowhere.md"] if git else ["../nowhere.md"]
    assert broken(root) == [f"docs/page.md: {target}" for target in missing]
