"""The settings of all tests."""

import gc
import os
from pathlib import Path

import pytest

# Before anything imports Triton: without a GPU its kernels run in the interpreter.
if not Path("/proc/driver/nvidia").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items):
    """Give one worker all tests of a file, or all of a backend's API.

    The latter share servers. A test that names its group keeps it.
    """
    for item in items:
        if item.get_closest_marker("xdist_group"):
            continue
        file = item.nodeid.split("::")[0]
        if file.startswith("tests/api/"):
            file = f"tests/api {'vllm' if item.get_closest_marker('vllm') else 'transformers'}"
        item.add_marker(pytest.mark.xdist_group(file))


def pytest_collection_finish():
    """Keep what is imported now out of every later search for garbage.

    A trainer searches as it begins, which took as long as a few of its steps.
    """
    gc.collect()
    gc.freeze()
