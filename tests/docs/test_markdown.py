"""Pages use only Markdown that both GitHub and the site render."""

import re

import pytest

from tests.support.repository import ROOT, pages

_DEFINITION = re.compile(r"^:\s+\S", re.MULTILINE)
_FENCE = re.compile(r"^( *)(`{3,}|~{3,}).*?^\1\2", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", pages())
def test_no_page_has_a_definition_list(page):
    """GitHub shows its definitions as paragraphs that begin with a colon."""
    assert _DEFINITION.findall(_FENCE.sub("", (ROOT / page).read_text())) == []
