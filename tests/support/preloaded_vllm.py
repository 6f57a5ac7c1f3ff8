"""The imports of the process that tests fork those from which run a vLLM engine.

Its engines are forked in their turn, where vLLM would spawn processes that import all again.
"""

import importlib
import multiprocessing
import os

# Before torch is imported: an engine that is forked from a process with threads of OpenMP hangs.
os.environ["OMP_NUM_THREADS"] = "1"
# Torch reads it when it is imported: vLLM's sampler would compile one small function for seconds.
os.environ["TORCH_COMPILE_DISABLE"] = "1"

# Before the modules that take it from there. On CPU vLLM spawns, whatever its variable says.
starts = importlib.import_module("vllm.utils.system_utils")
starts.get_mp_context = lambda: multiprocessing.get_context("fork")  # type: ignore[attr-defined]

for name in (
    "vllm.engine.arg_utils",
    "vllm.entrypoints.openai.api_server",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.qwen2",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "tests.support.preloaded",
):
    importlib.import_module(name)
