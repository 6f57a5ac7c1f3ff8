"""The private names of Python's own library that both sides read, one function each.

`tests/unit/shared/test_shared_compat.py` fails where an upgrade has changed one. Each side has a
file of its own: `student_trainer/runtime/compat.py` and `teacher_server/backends/compat.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def parser_actions(parser: argparse.ArgumentParser) -> Sequence[argparse.Action]:
    """Return a parser's arguments in their order.

    Reads ``ArgumentParser._actions``, from CPython 3.11. argparse has no public list of them.
    """
    return parser._actions
