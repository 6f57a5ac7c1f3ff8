"""The private names of Python's own library and of vLLM that both sides read, one function each.

`tests/unit/shared/test_shared_compat.py` fails where an upgrade has changed one. Each side has a
file of its own: `student_trainer/runtime/compat.py` and `teacher_server/backends/compat.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any


def parser_actions(parser: argparse.ArgumentParser) -> Sequence[argparse.Action]:
    """Return a parser's arguments in their order.

    Reads ``ArgumentParser._actions``, from CPython 3.11. argparse has no public list of them.
    """
    return parser._actions


def lora_modules(manager: Any) -> tuple[set[str], set[str]]:
    """Return names of the modules that loaded adapters change, and of those that can be changed.

    Reads ``WorkerLoRAManager._adapter_manager``, from vLLM 0.32.0. It ignores other modules of an
    adapter, and nothing public tells which.
    """
    adapters = manager._adapter_manager
    loaded = {name for lora in adapters.list_adapters().values() for name in lora.loras}
    return loaded, set(adapters.modules)
