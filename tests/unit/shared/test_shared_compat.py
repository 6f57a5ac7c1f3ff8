"""The private names of Python's own library and of vLLM that both sides read."""

import argparse
from types import SimpleNamespace

import pytest

from shared.compat import lora_modules, parser_actions
from tests.support.vllm import VLLM


def test_argparse_still_lists_its_arguments():
    parser = argparse.ArgumentParser(add_help=False)
    added = [parser.add_argument("--one"), parser.add_argument("two")]
    assert parser_actions(parser) == added, "CPython has changed ArgumentParser._actions"


class TestVllm:
    pytestmark = VLLM

    @pytest.mark.parametrize("module", ["q_proj", "visual"])
    def test_vllm_still_tells_its_adapters_and_modules(self, module):
        from vllm.lora.model_manager import LoRAModelManager
        from vllm.lora.worker_manager import WorkerLoRAManager

        adapters = LoRAModelManager.__new__(LoRAModelManager)
        adapters.modules = {"q_proj": None}
        adapters._registered_adapters = SimpleNamespace(
            cache={1: SimpleNamespace(loras={module: None})}
        )
        manager = WorkerLoRAManager.__new__(WorkerLoRAManager)
        manager._adapter_manager = adapters
        loaded, known = lora_modules(manager)
        assert loaded - known == {module} - {"q_proj"}
        names = WorkerLoRAManager.create_lora_manager.__code__.co_names
        assert "_adapter_manager" in names, "vLLM has renamed WorkerLoRAManager._adapter_manager"
