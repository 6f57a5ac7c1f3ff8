"""Formulas of the pages become MathML, or stay readable TeX where the converter is missing."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import markdown
import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "explanation" / "sparse-divergence.md").read_text()


@pytest.fixture(scope="module")
def hook():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs" / "reference"))
        import hook

        yield hook


def html_of(text):
    extensions = ["pymdownx.arithmatex", "pymdownx.superfences", "tables"]
    return markdown.markdown(
        text, extensions=extensions, extension_configs={extensions[0]: {"generic": True}}
    )


def test_every_formula_of_a_page_becomes_mathml(hook):
    pytest.importorskip("latex2mathml")
    html = hook.typeset(html_of(PAGE))
    formulas = re.findall(r"<math.*?</math>", html, re.DOTALL)
    assert len(formulas) > 40
    assert sum('display="block"' in formula for formula in formulas) == PAGE.count("$$") / 2
    for formula in formulas:
        # An unknown command of TeX would stand in it with its backslash.
        assert "\\" not in "".join(ElementTree.fromstring(formula).itertext()), formula
    assert "arithmatex" not in html
    assert "$" not in re.sub(r"<(math|code|annotation).*?</\1>", "", html, flags=re.DOTALL)


def test_without_the_converter_a_formula_stays_as_it_is_written(hook, monkeypatch):
    monkeypatch.setattr(hook, "converter", None)
    html = hook.typeset(html_of("so $Q_b < 1$ holds\n\n$$\nQ_b = \\sum q\n$$\n"))
    assert '<span><code class="formula">Q_b &lt; 1</code></span>' in html
    assert "Q_b = \\sum q" in html
    assert "arithmatex" not in html
