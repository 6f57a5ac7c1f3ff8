"""The files of this repository: those that a clone has."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def files(root: Path = ROOT) -> set[str]:
    """Return the paths of all files that git tracks; without git, of those that lie there.

    A file that is staged counts as tracked. One that git does not know would be missing in a clone.
    """
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=False
    )
    tracked = set(listed.stdout.split("\0")) - {""} if listed.returncode == 0 else set()
    return tracked or {
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(root).parts)
    }


def pages(root: Path = ROOT) -> list[str]:
    """Return the paths of all Markdown files of the repository, sorted."""
    return sorted(file for file in files(root) if file.endswith(".md"))
