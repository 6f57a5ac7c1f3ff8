"""The settings of all tests."""

import gc
import os
from pathlib import Path

import pytest
from hypothesis import settings

# An example that waits for a busy machine is no failure.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
# Before anything imports Triton: without a GPU its kernels run in the interpreter.
if not Path("/proc/driver/nvidia").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Groups that take longest, the longest first. A worker that begins one last runs alone in the end.
LONG = (
    "vllm",
    "tests/api",
    "tests/e2e/test_distillation.py",
    "tests/real/test_tokenizers.py",
    "tests/e2e/test_lm_eval.py",
    "tests/real/test_published_end_tokens.py",
    "tests/real/test_more_tokens_than_rows.py",
)


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items):
    """Give one worker all tests of a file, of the API, or of vLLM; and the long groups first.

    Those of the API share servers, those of vLLM the process that has imported it. A test that
    names its group keeps it.
    """
    groups = {item: group(item) for item in items}
    last = len(LONG)
    items.sort(key=lambda item: LONG.index(groups[item]) if groups[item] in LONG else last)
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(groups[item]))


def group(item):
    """Return the name of a test's group."""
    if marker := item.get_closest_marker("xdist_group"):
        return marker.args[0] if marker.args else marker.kwargs["name"]
    if item.get_closest_marker("vllm"):
        return "vllm"
    file = item.nodeid.split("::")[0]
    return "tests/api" if file.startswith("tests/api/") else file


def pytest_collection_finish():
    """Keep what is imported now out of every later search for garbage.

    A trainer searches as it begins, which took as long as a few of its steps.
    """
    gc.collect()
    gc.freeze()
