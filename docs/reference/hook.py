"""The hooks of mkdocs, which add pages that are made or that lie outside docs/."""

from __future__ import annotations

import os
import re
from html import escape, unescape
from pathlib import Path, PurePosixPath

import command_line
import http_api
import python_modules
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

try:
    from latex2mathml import converter
except ImportError:  # the pages can be read without
    converter = None

ROOT = Path(__file__).parents[2]
# Pages outside docs/, by their name on the site, where a README would be the start page.
ROOT_PAGES = {name: name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")}
ROOT_PAGES["README.md"] = "overview.md"
# Browsers break lines after the hyphens of a --flag, so short ones are kept whole.
_FLAG = re.compile(r"<code>(-[^<]{1,34})</code>")
_FROM_ELSEWHERE = re.compile(r"<(?:script|img|iframe|link rel=.(?:stylesheet|icon))[^>]*https?://")
# What pymdownx.arithmatex leaves of $…$ and $$…$$.
_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)
# The target of a Markdown link to a file, without its anchor.
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")
# The text and target of a link; one to a folder, which a site cannot show, becomes its text.
_WHOLE_LINK = re.compile(r"\[([^\]]+)\]\((?![a-z]+:|#)([^)#\s]+)\)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the reference, the pages of the root, and the files that pages link to."""
    made = {
        "reference/student-trainer.md": command_line.student_trainer_page(),
        "reference/teacher-server.md": command_line.teacher_server_page(),
        "reference/http.md": http_api.page(),
        "reference/python.md": python_modules.page(),
    }
    for path, text in made.items():
        # For readers of a clone a page of this name says how to build it.
        if (placeholder := files.get_file_from_path(path)) is not None:
            files.remove(placeholder)
        files.append(File.generated(config, path, content=text))
    for path, name in ROOT_PAGES.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=text))
    # A file that a page links to has the same path on the site.
    pages = [*(Path(path) for path in ROOT_PAGES), *ROOT.glob("docs/**/*.md")]
    for path in sorted({target for page in pages for target in _targets(page)}):
        if path not in ROOT_PAGES and not path.startswith("docs/") and (ROOT / path).is_file():
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def _targets(page: Path) -> set[str]:
    """Return the targets of a page's links, as paths in the repository."""
    text = (ROOT / page).read_text(encoding="utf-8")
    folder = (ROOT / page).parent.relative_to(ROOT)
    return {os.path.normpath(folder / link) for link in _LINK.findall(text)}


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links out of docs/ and into it, which are written for the repository."""
    here = PurePosixPath(page.file.src_uri).parent
    at_root = page.file.src_uri in ROOT_PAGES.values()
    folder = here if at_root else PurePosixPath("docs") / here

    def without_folder(link: re.Match[str]) -> str:
        return link[1] if (ROOT / folder / link[2]).is_dir() else link[0]

    def on_site(link: re.Match[str]) -> str:
        target = os.path.normpath(folder / link[1])
        target = ROOT_PAGES.get(target, target.removeprefix("docs/"))
        return os.path.relpath(target, here)

    return _LINK.sub(on_site, _WHOLE_LINK.sub(without_folder, markdown))


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    return typeset(_FLAG.sub(r'<code class="flag">\1</code>', html))


def typeset(html: str) -> str:
    """Return a page whose formulas are MathML, which browsers draw without a script.

    Without the package latex2mathml they stay as they are written, in TeX.
    """

    def formula(found: re.Match[str]) -> str:
        tag, tex = found["tag"], unescape(found["tex"])
        if converter is None:
            return f'<{tag}><code class="formula">{escape(tex)}</code></{tag}>'
        math: str = converter.convert(tex, display="block" if tag == "div" else "inline")
        return f'<div class="formula">{math}</div>' if tag == "div" else math

    return _FORMULA.sub(formula, html)


def on_post_page(output: str, *, page: Page, config: MkDocsConfig) -> None:
    """Check that a page loads nothing from another host.

    Raises:
        PluginError: it would.
    """
    if found := _FROM_ELSEWHERE.search(output):
        raise PluginError(f"{page.file.src_uri}: needs the network: {found[0]}")
