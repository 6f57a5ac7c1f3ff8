"""What mkdocs calls while it builds: pages that are made or that lie outside docs/."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

import command_line
import http_api
import python_modules
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
# Beside docs/ on GitHub, beside the other pages on the site.
ROOT_PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
# The target of a Markdown link to a file, without its anchor.
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the reference, and the root's pages with what they link to."""
    made = {
        "reference/student-trainer.md": command_line.student_trainer_page(),
        "reference/teacher-server.md": command_line.teacher_server_page(),
        "reference/http.md": http_api.page(),
        "reference/python.md": python_modules.page(),
    }
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    linked = set[str]()
    for name in ROOT_PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=text))
        linked.update(_LINK.findall(text))
    for path in sorted(linked):
        if not path.startswith("docs/") and path not in ROOT_PAGES and (ROOT / path).is_file():
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between docs/ and the root, as they are written for the repository's own pages."""
    here = PurePosixPath(page.file.src_uri).parent
    if page.file.src_uri in ROOT_PAGES:
        return _LINK.sub(lambda link: link[1].removeprefix("docs/"), markdown)

    def outside(link: re.Match[str]) -> str:
        target = os.path.normpath(PurePosixPath("docs") / here / link[1])
        return os.path.relpath(target, here) if target in ROOT_PAGES else link[1]

    return _LINK.sub(outside, markdown)
