"""README.md, the reference and `--help` list the same flags, in the same words."""

import re
from pathlib import Path

import pytest

from student_trainer.config.flags import flags_of
from student_trainer.config.help import summary
from student_trainer.config.parse import ARGUMENTS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def command_line():
    """The module that makes the reference page of the commands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs" / "reference"))
        import command_line

        yield command_line


def test_the_readme_has_the_flags_that_matter_in_the_words_of_the_help(command_line):
    table = command_line.common_table()
    assert "\n".join(table) in (ROOT / "README.md").read_text()
    named = {re.match(r"\| `--(\w+)`", line)[1] for line in table[2:]}
    flags = {name: one for kind in ARGUMENTS["distill"] for name, one in flags_of(kind).items()}
    assert named == {name for name, one in flags.items() if one.common}


def test_the_first_sentence_of_each_common_flag_fits_a_line_or_two():
    for kinds in ARGUMENTS.values():
        for kind in kinds:
            for name, one in flags_of(kind).items():
                assert not one.common or 10 < len(summary(one)) <= 140, name


def test_the_reference_has_each_flag_once_and_in_a_group(command_line):
    page = command_line.student_trainer_page()
    for name, one in ((n, o) for k in ARGUMENTS["distill"] for n, o in flags_of(k).items()):
        if one.group is not None:
            title = f"\n## {one.group[0].upper()}{one.group[1:]}\n"
            section = page.split(title)[1].split("\n## ")[0]
            assert f"{{#flag-{name}}}" in section, name
            assert page.count(f"{{#flag-{name}}}") == 1
