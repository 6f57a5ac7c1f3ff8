"""The loading of model, tokenizer and configuration from a folder, adapters or the Hub."""

from __future__ import annotations

import contextlib
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file

from shared.errors import ConfigurationError
from shared.model_names import describe_missing, near_path
from shared.tokenizer_file import check_keeps_text, differs_from_file, verified_tokenizer
from student_trainer.config.arguments import AdapterArguments, ModelArguments
from student_trainer.config.checks import holds_adapters
from student_trainer.config.keywords import keywords_in_errors
from student_trainer.data.end_tokens import stop_token_ids, text_end_id
from student_trainer.model.merging import merge_adapters

logger = logging.getLogger(__name__)


def load_config(arguments: ModelArguments) -> PreTrainedConfig:
    """Return the model's configuration; for a folder of adapters, that of their base model."""
    if arguments.loaded is not None:
        return arguments.loaded.model.config
    return _from_hub_or_folder(AutoConfig, _base_of(arguments))


def load_tokenizer(arguments: ModelArguments) -> PreTrainedTokenizerBase:
    """Return the tokenizer, checked against its tokenizer.json.

    ``--eos_token`` and ``--chat_template`` replace its own where they are given.

    Raises:
        ConfigurationError: the tokenizer does not load or does not preserve text, the EOS token is
            not in its vocabulary, or the template file cannot be read.
    """
    if arguments.loaded is not None:
        check_loaded_tokenizer(arguments.loaded.tokenizer)
        return arguments.loaded.tokenizer
    tokenizer: PreTrainedTokenizerBase = verified_tokenizer(
        _from_hub_or_folder(AutoTokenizer, arguments),
        _tokenizer_file(arguments.model_name_or_path, arguments.model_revision),
        lambda: _from_hub_or_folder(PreTrainedTokenizerFast, arguments),
        name=f"--model_name_or_path {arguments.model_name_or_path}",
    )
    if arguments.eos_token is not None:
        if arguments.eos_token not in tokenizer.get_vocab():
            raise ConfigurationError(
                f"--eos_token {arguments.eos_token!r} is not a token of the tokenizer; its own is "
                f"{tokenizer.eos_token!r}"
            )
        tokenizer.eos_token = arguments.eos_token
    if arguments.chat_template is not None:
        tokenizer.chat_template = _read_template(arguments.chat_template)
    return tokenizer


def tokenizer_from(given: str | Path | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a tokenizer that a Python caller gives as it is, or by folder or Hub id.

    Raises:
        ConfigurationError: there is no such folder, or the tokenizer does not load or does not
            preserve text.
    """
    if not isinstance(given, str | Path):
        return given
    if missing := describe_missing(str(given)):
        raise ConfigurationError(f"tokenizer=: {missing}; give a folder or a Hub id")
    with keywords_in_errors({"model_name_or_path": "tokenizer"}, {"model_name_or_path": given}):
        return load_tokenizer(ModelArguments(model_name_or_path=str(given)))


def _read_template(name: str) -> str:
    try:
        text = Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--chat_template {name}: {error}") from error
    if not text.strip():
        raise ConfigurationError(f"--chat_template {name} is empty")
    return text


def check_loaded_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check a tokenizer that was given in memory, and compare it with the file it came from.

    A difference from the file may be intended, so it is a warning.

    Raises:
        ConfigurationError: the tokenizer does not preserve text.
    """
    name = str(tokenizer.name_or_path or type(tokenizer).__name__)
    file = Path(name) / "tokenizer.json"
    found = differs_from_file(tokenizer, file) if file.is_file() else None
    check_keeps_text(tokenizer, name=name)
    if found is not None:
        logger.warning(
            "%s: this %s does not do what tokenizer.json says (%s); unless that is meant, load it "
            "with PreTrainedTokenizerFast.from_pretrained(%r)",
            name, type(tokenizer).__name__, found, name,
        )  # fmt: skip


def _tokenizer_file(model: str, revision: str) -> Path | None:
    """Return the ``tokenizer.json`` of a folder or Hub id, or None."""
    try:
        file = cached_file(
            model, "tokenizer.json", revision=revision, _raise_exceptions_for_missing_entries=False
        )
    except OSError:  # the Hub does not answer, and the file is not in its cache
        return None
    return None if file is None else Path(file)


def load_stop_ids(arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a completion; see `end_tokens.stop_token_ids`."""
    return stop_token_ids(tokenizer, _generation_config(arguments))


def load_text_end(arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that ends plain text; see `end_tokens.text_end_id`.

    It is None with ``--eos_token``, which ends plain text too.
    """
    if arguments.eos_token is not None:
        return None
    return text_end_id(tokenizer, _generation_config(arguments))


def _generation_config(arguments: ModelArguments) -> GenerationConfig | None:
    if arguments.loaded is not None:
        return arguments.loaded.model.generation_config
    base = _base_of(arguments)
    with contextlib.suppress(OSError):  # many checkpoints have no generation config
        return GenerationConfig.from_pretrained(
            base.model_name_or_path, revision=base.model_revision
        )
    return None


def context_length(config: PreTrainedConfig) -> int:
    """Return the longest sequence in tokens, or 2³⁰ for models without a limit."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", 0) or 1 << 30)


def usual_dtype(*, gpu: bool = True) -> str:
    """Return the dtype of ``--torch_dtype auto``: bfloat16 on a GPU that has it, else float32.

    In transformers "auto" is the checkpoint's own, which is ``checkpoint`` here.

    Args:
        gpu: use one if there is one.
    """
    has = gpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported(False)
    return "bfloat16" if has else "float32"


def _dtype(arguments: ModelArguments) -> str:
    """Return the dtype for `from_pretrained`, whose "auto" is the checkpoint's."""
    names = {"auto": usual_dtype(), "checkpoint": "auto"}
    return names.get(arguments.torch_dtype, arguments.torch_dtype)


def load_model(arguments: ModelArguments, **options: Any) -> Any:
    """Return the causal language model, with LoRA adapters merged into their base.

    Args:
        options: arguments of ``from_pretrained``.

    Raises:
        ConfigurationError: the model does not load, or weights are missing.
    """
    if arguments.loaded is not None:
        return arguments.loaded.model
    if arguments.attn_implementation is not None:
        options["attn_implementation"] = arguments.attn_implementation
    base = _base_of(arguments)
    model, report = _from_hub_or_folder(
        AutoModelForCausalLM,
        base,
        dtype=_dtype(arguments),
        output_loading_info=True,
        **options,
    )
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would initialise them at random and continue
        raise ConfigurationError(
            f"--model_name_or_path {base.model_name_or_path} lacks {len(missing)} weights of "
            f"{type(model).__name__}, {missing[0]} among them; give a complete checkpoint"
        )
    if base is arguments:
        return model
    return merge_adapters(_adapted(model, arguments)).requires_grad_(True)  # peft froze the base


def _adapted(model: Any, arguments: ModelArguments) -> Any:
    """Return a base model with the adapters of a folder.

    Raises:
        ConfigurationError: they do not load.
    """
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, arguments.model_name_or_path)
    except Exception as error:  # whatever an adapter's files can cause
        raise ConfigurationError(
            f"--model_name_or_path {arguments.model_name_or_path}: the adapters do not load: "
            f"{' '.join(str(error).split()) or type(error).__name__:.500}"
        ) from error


def load_student(
    arguments: ModelArguments, adapters: AdapterArguments, *, gradient_checkpointing: bool = False
) -> Any:
    """Return the model for the Trainer, with new adapters where the arguments ask for them.

    Raises:
        ConfigurationError: as in `load_model`, or the adapters do not fit the model.
    """
    options: dict[str, Any] = {}
    if adapters.load_in_4bit:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=True,
        )
    model = load_model(arguments, **options)
    if adapters.use_peft:
        model = _add_adapters(model, adapters, gradient_checkpointing)
    return model


def load_skeleton(
    arguments: ModelArguments, adapters: AdapterArguments, *, gradient_checkpointing: bool = False
) -> Any:
    """Return the model of `load_student` on the meta device: shapes and dtypes without weights.

    With ``load_in_4bit`` the weights are not quantised.

    Raises:
        ConfigurationError: as in `load_student`.
    """
    config = load_config(arguments)
    dtype = getattr(torch, _dtype(arguments), None) or config.dtype or torch.float32
    options: dict[str, Any] = {"trust_remote_code": arguments.trust_remote_code}
    if arguments.attn_implementation is not None:
        options["attn_implementation"] = arguments.attn_implementation
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
        except Exception as error:  # a checkpoint's code or a missing package may raise anything
            raise ConfigurationError(
                f"--model_name_or_path {arguments.model_name_or_path}: there is no causal language "
                f"model of this configuration: {error}"
            ) from error
        return (
            _add_adapters(model, adapters, gradient_checkpointing) if adapters.use_peft else model
        )


def _add_adapters(model: Any, arguments: AdapterArguments, gradient_checkpointing: bool) -> Any:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if arguments.load_in_4bit:
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=gradient_checkpointing
        )
    elif gradient_checkpointing:
        model.enable_input_require_grads()
    targets = arguments.lora_target_modules or ["all-linear"]
    config = LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ConfigurationError(f"--lora_target_modules {targets}: {error}") from error


def _base_of(arguments: ModelArguments) -> ModelArguments:
    """Return ``arguments``, or for a folder of adapters the arguments of their base model.

    Raises:
        ConfigurationError: the adapters' configuration names no base model.
    """
    if not holds_adapters(arguments.model_name_or_path):
        return arguments
    file = Path(arguments.model_name_or_path) / "adapter_config.json"
    try:
        config = json.loads(file.read_text())
        name, revision = config["base_model_name_or_path"], config.get("revision") or "main"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{file} names no base_model_name_or_path") from error
    if missing := describe_missing(str(name)):
        raise ConfigurationError(f"{file}: base_model_name_or_path: {missing}; give it its path")
    return replace(arguments, model_name_or_path=str(name), model_revision=str(revision))


def _from_hub_or_folder(auto_class: Any, arguments: ModelArguments, **options: Any) -> Any:
    try:
        return auto_class.from_pretrained(
            arguments.model_name_or_path,
            revision=arguments.model_revision,
            trust_remote_code=arguments.trust_remote_code,
            **options,
        )
    except Exception as error:  # a checkpoint's files or a missing package may raise anything
        name = arguments.model_name_or_path
        kind = (
            "this folder"
            if Path(name).is_dir()
            else (f"folder {name} does not exist{near_path(name)}, and as a Hub id it")
        )
        raise ConfigurationError(
            f"--model_name_or_path {name}: {kind} does not load with {auto_class.__name__}: "
            f"{' '.join(str(error).split()) or type(error).__name__}"
        ) from error
