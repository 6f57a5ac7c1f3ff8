"""Teachers in processes of their own, shared by all tests of the API.

Those of `test_stopping` end them, so they come last.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.support.models import save_model, save_tokenizer
from tests.support.reference import load_model
from tests.support.server import Running, server_running
from tests.support.vllm import VLLM

# vLLM's attention on CPU takes heads of 32 and more. Weights are half as large as elsewhere, so
# that logits, and with them float32's rounding, are no larger than a narrow model's.
SHAPE = {
    "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1,
    "initializer_range": 0.1,
}  # fmt: skip


@pytest.hookimpl(trylast=True)  # pytest itself sorts by the parameters of fixtures
def pytest_collection_modifyitems(items):
    """Put the tests that end a server behind those that ask it."""
    items.sort(key=lambda item: item.path.name == "test_stopping.py")


@dataclass(frozen=True)
class Served:
    """A model's folder, the model itself in float32, and the server that has it."""

    folder: Path
    model: Any
    server: Running
    backend: str

    @property
    def url(self):
        return self.server.url

    @property
    def tokens(self):
        """Tokens of the tokenizer: what is generated; the output layer has padding rows beyond."""
        return httpx.get(f"{self.url}/v1/info").json()["tokenizer"]["vocab_size"]

    @property
    def tolerance(self):
        """Largest difference from plain float32.

        A batch rounds otherwise than a sequence alone; vLLM's CPU kernels approximate exponentials
        on top.
        """
        return {"transformers": 1e-5, "vllm": 1e-4}[self.backend]


@pytest.fixture(scope="session", params=["transformers", pytest.param("vllm", marks=VLLM)])
def backend(request):
    return request.param


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Qwen2-style, and like its big siblings padded: 272 output rows for 260 tokens."""
    folder = tmp_path_factory.mktemp("qwen2")
    save_tokenizer(folder)
    save_model(folder, family="qwen2", vocab_size=272, **SHAPE)
    return folder


@pytest.fixture(scope="session")
def teacher(folder, backend):
    with server_running(folder, "--backend", backend, "--max-batch-tokens", "2048") as server:
        yield Served(folder, load_model(folder), server, backend)


@pytest.fixture(scope="session")
def half(folder, backend):
    """The same model in bfloat16, by the command itself, so that vLLM spawns its engine."""
    flags = ["--backend", backend, "--dtype", "bfloat16", "--max-batch-tokens", "2048"]
    with server_running(folder, *flags, "--max-top-k", "272", command_line=True) as server:
        yield Served(folder, load_model(folder), server, backend)


@pytest.fixture(scope="session")
def long_folder(tmp_path_factory):
    """A long context, and an end token that greedy decoding never takes: it runs for seconds."""
    folder = tmp_path_factory.mktemp("llama")
    save_tokenizer(folder)
    save_model(folder, max_position_embeddings=8192, **SHAPE)
    model = load_model(folder)
    with torch.no_grad():
        model.lm_head.weight[1] = 0.0
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def strict(long_folder, backend):
    """A teacher that takes little, waits briefly and computes 2,048 tokens at once.

    vLLM runs two sequences at a time.
    """
    engine_flags = ["--max-num-seqs", "2"] if backend == "vllm" else []
    with server_running(
        long_folder, "--backend", backend, *engine_flags,
        "--max-queued-tokens", "8000", "--max-request-tokens", "8000", "--request-timeout", "5",
        "--max-top-k", "50", "--max-request-bytes", "100000", "--max-batch-tokens", "2048",
    ) as server:  # fmt: skip
        yield Served(long_folder, load_model(long_folder), server, backend)
