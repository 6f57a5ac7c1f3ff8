"""The private names of other people's code that the trainer depends on: the first to fail.

Where a test fails after an upgrade, read the release's code and mend
`student_trainer/runtime/compat.py`, or the method that overrides the one named here.
"""

import atexit
import inspect
import threading
from contextlib import nullcontext
from datetime import timedelta
from types import SimpleNamespace

import httpcore
import httpx
import pytest
import torch
from accelerate.state import PartialState
from peft.tuners.lora import LoraLayer
from transformers import LlamaConfig, PreTrainedTokenizerFast, Trainer, trainer_utils
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations import integration_utils
from transformers.trainer_callback import CallbackHandler
from transformers.utils.generic import is_flash_attention_requested

from student_trainer.runtime import compat
from student_trainer.training.durable import DurableTrainer
from student_trainer.training.trainer import DistillationTrainer

TRAINER = {
    "_get_output_dir": ("trial",),
    "_save_checkpoint": ("model", "trial"),
    "_push_from_checkpoint": ("checkpoint_folder",),
    "_get_grad_norm": ("model", "grad_norm"),
}  # fmt: skip
# Neither private nor documented.
UNDOCUMENTED = {
    "training_step": ("model", "inputs", "num_items_in_batch"),
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "get_batch_samples": ("epoch_iterator", "num_batches", "device"),
    "evaluation_loop": (
        "dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix",
    ),
}  # fmt: skip
CALLED = [
    (trainer_utils.sort_checkpoints,
     ("output_dir", "checkpoint_prefix", "use_mtime", "best_model_checkpoint")),
    (trainer_utils.get_last_checkpoint, ("folder",)),
    (is_flash_attention_requested, ("config", "requested_attention_implementation", "version")),
    (revert_weight_conversion, ("model", "state_dict")),
    (threading._shutdown, ()),
]  # fmt: skip


def parameters(function):
    return tuple(inspect.signature(function).parameters)


@pytest.mark.parametrize(("name", "expected"), [*TRAINER.items(), *UNDOCUMENTED.items()])
def test_the_trainer_has_the_methods_that_are_overridden(name, expected):
    method = getattr(Trainer, name, None)
    assert method is not None, f"transformers has no Trainer.{name} any more"
    assert parameters(method) == ("self", *expected), f"Trainer.{name} takes other arguments"


@pytest.mark.parametrize("name", TRAINER)
def test_the_trainer_calls_what_is_overridden(name):
    """One that is never called would be overridden in vain."""
    calls = [
        function for function in vars(Trainer).values()
        if inspect.isfunction(function) and name in function.__code__.co_names
    ]  # fmt: skip
    assert calls, f"nothing in the Trainer calls {name} any more"


def test_every_overridden_private_method_is_in_the_table():
    own = {**vars(DurableTrainer), **vars(DistillationTrainer)}
    overridden = {n for n in own if n.startswith("_") and n[1] != "_" and hasattr(Trainer, n)}
    assert overridden == set(TRAINER)
    for name in overridden:
        assert f"`{name}`" in compat.__doc__


@pytest.mark.parametrize(
    ("function", "expected"), CALLED, ids=lambda one: getattr(one, "__name__", "")
)
def test_functions_that_are_called_take_the_known_arguments(function, expected):
    assert parameters(function) == expected


def test_python_has_what_ends_a_process():
    assert callable(getattr(atexit, "_run_exitfuncs", None)), "CPython has no atexit._run_exitfuncs"


def test_a_transport_opens_connections_by_the_backend_that_is_set():
    opened = []

    class Backend(httpcore.NetworkBackend):
        def connect_tcp(self, host, port, **options):
            opened.append((host, port))
            raise httpcore.ConnectError("as it should")

    with httpx.HTTPTransport() as transport:
        assert hasattr(transport._pool, "_network_backend"), "httpcore has renamed its backend"
        compat.set_network_backend(transport, Backend())
        with pytest.raises(httpx.ConnectError, match="as it should"):
            transport.handle_request(httpx.Request("GET", "http://teacher.example:81/"))
    assert opened == [("teacher.example", 81)]


def test_hooks_of_a_weights_gradient_are_seen():
    weight = torch.nn.Parameter(torch.zeros(2))
    assert not compat.has_gradient_hooks(weight)
    for register in (weight.register_hook, weight.register_post_accumulate_grad_hook):
        hook = register(lambda gradient: None)
        assert compat.has_gradient_hooks(weight)
        hook.remove()
        assert not compat.has_gradient_hooks(weight)


def test_a_gloo_group_has_the_devices_and_the_timeout_that_it_is_given():
    group = torch.distributed.ProcessGroupGloo
    device = group.create_device(hostname="127.0.0.1")
    seconds = timedelta(seconds=7)
    joined = compat.gloo_group(torch.distributed.HashStore(), 0, 1, [device], seconds)
    assert isinstance(joined, group)
    assert joined.options._devices == [device]
    assert joined.options._timeout == seconds


def test_a_configuration_keeps_its_attention():
    config = LlamaConfig(attn_implementation="sdpa")
    assert compat.attention_of(config) == "sdpa"
    compat.set_attention(config, "eager")
    assert compat.attention_of(config) == "eager"
    assert not compat.is_flash_attention_requested(config)
    compat.set_attention(config, "flash_attention_2")
    assert compat.is_flash_attention_requested(config)


def test_the_trainers_warnings_of_keys_are_known_by_their_text(caplog):
    keys = SimpleNamespace(missing_keys=["a"], unexpected_keys=["b"])
    model = SimpleNamespace(_keys_to_ignore_on_save=None)

    def warned(context):
        caplog.clear()
        with caplog.at_level("WARNING"), context:
            Trainer._issue_warnings_after_load(SimpleNamespace(model=model), keys)
        return {record.getMessage() for record in caplog.records}

    assert len(warned(nullcontext())) == 2
    assert not warned(compat.without_key_warnings())


def test_parts_that_are_public_but_not_documented_exist():
    assert isinstance(PreTrainedTokenizerFast.backend_tokenizer, property)
    assert "distributed_type" in PartialState._known_attrs
    assert isinstance(CallbackHandler([], None, None, None, None).callbacks, list)
    assert "lora_A" in LoraLayer.adapter_layer_names


def test_names_with_a_group_are_kept_and_others_are_rewritten_as_ever():
    logs = {"train/loss": 1.0, "time/step": 2.0, "loss": 3.0, "eval_loss": 4.0}
    as_ever = integration_utils.rewrite_logs
    assert "train/train/loss" in as_ever(logs), "transformers keeps such names by itself"
    with compat.names_kept(("train/", "time/")):
        assert integration_utils.rewrite_logs({"train/a": 1, "time/b": 2, "c": 3, "eval_d": 4}) == {
            "train/a": 1, "time/b": 2, "train/c": 3, "eval/d": 4,
        }  # fmt: skip
    assert integration_utils.rewrite_logs is as_ever
    for function in ("TensorBoardCallback", "WandbCallback"):
        on_log = getattr(integration_utils, function).on_log
        assert "rewrite_logs" in on_log.__code__.co_names, f"{function} rewrites names elsewhere"
