"""The private names of vLLM and PEFT that the teacher server calls or reads, one function each.

An upgrade may change them without a word. `test_vllm_names.py` then fails first, and names what
changed. At run time `checked_method` refuses what it does not know, and the server scores by vLLM's
public API instead. Also held there, though their names have no underscore, are the other parts of
vLLM 0.32.0's model runners that no document describes:

==================================================== =========================================
name                                                 where
==================================================== =========================================
`PromptLogprobsWorker.add_request`, `remove_request` the hook of the second runner, in
and `compute_prompt_token_id_logprobs`               `vllm_worker`
`GPUModelRunner.sample_tokens`, `requests`,          the hook of the first, in `vllm_worker`
`input_batch`, `query_start_loc`
`GPUModelRunner.discard_request_mask`                `shared.vllm_sampling`
==================================================== =========================================
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_PROMPT_LOGPROBS = "_get_prompt_logprobs_dict"


def is_first_runner(runner: Any) -> bool:
    """Return whether a model runner is vLLM's first kind, which makes prompt log-probs itself.

    Looks for ``GPUModelRunner._get_prompt_logprobs_dict``, from vLLM 0.32.0. Both runners have the
    same class name, and nothing public says which it is.
    """
    return hasattr(runner, _PROMPT_LOGPROBS)


def prompt_logprobs_method(runner: Any) -> Callable[..., Any]:
    """Return the method of the first runner that is called with the hidden states of each step.

    Reads ``GPUModelRunner._get_prompt_logprobs_dict``, from vLLM 0.32.0. There is no public hook at
    which hidden states are seen.

    Raises:
        RuntimeError: it takes other parameters than it did.
    """
    return checked_method(runner, _PROMPT_LOGPROBS, "hidden_states", "num_scheduled_tokens")


def replace_prompt_logprobs_method(runner: Any, method: Callable[..., Any]) -> None:
    """Put a function in place of `prompt_logprobs_method`, which it has to call."""
    setattr(runner, _PROMPT_LOGPROBS, method)


def runner_output(output: Any) -> Any:
    """Return the `ModelRunnerOutput` of a step, also of one whose copies are under way.

    Reads ``AsyncGPUModelRunnerOutput._model_runner_output``, from vLLM 0.32.0. The public
    ``get_output()`` waits for the device.
    """
    return getattr(output, "_model_runner_output", output)


def checked_method(owner: Any, name: str, *parameters: str) -> Callable[..., Any]:
    """Return the method to wrap, if its parameters are the known ones.

    Raises:
        RuntimeError: the method is missing, or takes other parameters.
    """
    method: Callable[..., Any] | None = getattr(owner, name, None)
    if method is None:
        raise RuntimeError(f"{type(owner).__name__} has no {name}")
    found = tuple(inspect.signature(method).parameters)
    if found != parameters:
        raise RuntimeError(f"{type(owner).__name__}.{name} takes {found}, not {parameters}")
    return method


@contextmanager
def mixed_adapters(model: Any, names: Sequence[str | None]) -> Iterator[None]:
    """Give each sequence of a batch its own LoRA adapter, None for none, in every forward pass.

    Calls ``PeftModel._enable_peft_forward_hooks``, from PEFT 0.19. `PeftModel.forward` takes
    ``adapter_names`` publicly, but scoring stops before the output layer, and `generate` calls the
    model itself.
    """
    named = ["__base__" if name is None else name for name in names]
    with model._enable_peft_forward_hooks(adapter_names=named):
        yield
