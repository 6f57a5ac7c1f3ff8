"""The date in prompts is that of the run's first start."""

import datetime

import pytest

from shared.errors import ConfigurationError
from student_trainer.data.template_date import FILE, keep_date, read_date

FIRST = datetime.date(2026, 1, 2)


def test_the_date_is_kept_and_read_again(tmp_path):
    output, cache = tmp_path / "out", tmp_path / "cache"
    assert read_date(None, [output, cache]) == datetime.date.today()
    keep_date(FIRST, [cache])
    assert read_date(None, [output, cache]) == FIRST
    keep_date(datetime.date(2026, 3, 4), [output, cache])  # what is there stays
    assert (cache / FILE).read_text() == "2026-01-02\n"
    assert read_date(None, [output, cache]) == datetime.date(2026, 3, 4)
    assert read_date("2026-05-06", [output, cache]) == datetime.date(2026, 5, 6)


@pytest.mark.parametrize("given", ["today", "2026-13-01", ""])
def test_what_is_no_date_is_refused(given):
    with pytest.raises(ConfigurationError, match=r"--chat_template_date .* must be a date such as"):
        read_date(given, [])
