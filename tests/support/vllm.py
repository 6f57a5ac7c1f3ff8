"""The marks of tests that need vLLM, and engines that start soon."""

import contextlib
import multiprocessing
from importlib.util import find_spec
from unittest import mock

import pytest
import torch._dynamo

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


@contextlib.contextmanager
def forked_engines():
    """Let engines of this process be forked from it, where vLLM would spawn two processes.

    Each would import all again, which takes far longer than what most tests ask of an engine. They
    are spawned on a GPU, and from a process in which torch has several threads: OpenMP does not
    survive a fork then, and the engine would hang.
    """
    if torch.cuda.is_available() or torch.get_num_threads() > 1:
        yield
        return
    import vllm.v1.engine.utils
    import vllm.v1.executor.multiproc_executor

    fork = multiprocessing.get_context("fork")
    with contextlib.ExitStack() as patches:
        for module in (vllm.v1.engine.utils, vllm.v1.executor.multiproc_executor):
            patches.enter_context(mock.patch.object(module, "get_mp_context", return_value=fork))
        # Torch read the variable before engines set it.
        patches.enter_context(torch._dynamo.config.patch(disable=True))
        yield
