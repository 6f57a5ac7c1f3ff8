"""The private names of vLLM that the teacher server depends on: the first to fail.

Where a test fails after an upgrade, read vLLM's model runners and mend
`teacher_server/backends/compat.py`; until then the server scores by vLLM's public API, slowly.
"""

import inspect
from types import SimpleNamespace

import pytest

from teacher_server.backends import compat
from tests.support.vllm import VLLM


def test_an_output_is_found_inside_its_wrapper_and_without():
    output = SimpleNamespace()
    assert compat.runner_output(SimpleNamespace(_model_runner_output=output)) is output
    assert compat.runner_output(output) is output


def test_a_missing_method_is_named():
    with pytest.raises(RuntimeError, match="SimpleNamespace has no add_request"):
        compat.checked_method(SimpleNamespace(), "add_request", "req_id")


class TestVllm:
    pytestmark = VLLM

    def test_the_first_runner_has_the_method_that_is_wrapped(self):
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        runner = GPUModelRunner.__new__(GPUModelRunner)
        assert compat.is_first_runner(runner), "vLLM has renamed _get_prompt_logprobs_dict"
        assert compat.prompt_logprobs_method(runner)
        assert callable(GPUModelRunner.sample_tokens)

    @pytest.mark.parametrize(
        "name", ["requests", "input_batch", "query_start_loc", "discard_request_mask"]
    )
    def test_the_first_runner_has_the_attributes_that_are_read(self, name):
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        init = inspect.unwrap(GPUModelRunner.__init__)
        assert name in init.__code__.co_names, f"no GPUModelRunner.{name}"

    def test_an_asynchronous_output_wraps_the_one_that_is_filled(self):
        from vllm.v1.outputs import ModelRunnerOutput
        from vllm.v1.worker.gpu_model_runner import AsyncGPUModelRunnerOutput

        assert "_model_runner_output" in AsyncGPUModelRunnerOutput.__init__.__code__.co_names
        assert "prompt_token_id_logprobs_dict" in inspect.signature(ModelRunnerOutput).parameters

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("add_request", ("req_id", "req_idx", "sampling_params")),
            ("remove_request", ("req_id",)),
            (
                "compute_prompt_token_id_logprobs",
                ("logits_fn", "hidden_states", "input_batch", "prompt_lens"),
            ),
        ],
    )
    def test_the_second_runner_has_the_methods_that_are_wrapped(self, name, expected):
        from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

        worker = PromptLogprobsWorker.__new__(PromptLogprobsWorker)
        assert compat.checked_method(worker, name, *expected)

    def test_an_engine_that_died_has_the_known_error(self):
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        assert issubclass(EngineDeadError, Exception)
        assert next(iter(inspect.signature(tokens_input).parameters)) == "prompt_token_ids"
