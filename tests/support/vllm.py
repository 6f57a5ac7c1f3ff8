"""The marks of tests that need vLLM."""

from importlib.util import find_spec

import pytest

# With vLLM: `make test`, which installs it; without: `make test VLLM=0`, or -m 'not vllm'.
VLLM = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed: make .venv/vllm"),
]


def only(backend):
    """Return a mark that runs a test of the API on one backend alone."""
    marks = VLLM if backend == "vllm" else []
    values = [pytest.param(backend, marks=marks)]
    return pytest.mark.parametrize("backend", values, indirect=True, scope="session")
