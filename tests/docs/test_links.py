"""Links between pages lead to files that a clone has."""

import re
import subprocess

import pytest

from tests.docs.test_words import ROOT

_LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)")


def tracked():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return set(listed.stdout.split("\n")) - {""}


def test_each_relative_link_leads_to_a_file_of_the_repository():
    files = tracked()
    if not files:
        pytest.skip("no git repository here")
    folders = {str(parent) for file in files for parent in (ROOT / file).parents}
    pages = [file for file in files if file.endswith(".md")]
    broken = [
        f"{page}: {target}"
        for page in pages
        for target in _LINK.findall((ROOT / page).read_text(encoding="utf-8"))
        for found in [(ROOT / page).parent.joinpath(target).resolve()]
        if str(found.relative_to(ROOT)) not in files and str(found) not in folders
    ]
    assert pages
    assert broken == []
