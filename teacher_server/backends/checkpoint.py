"""What every backend reads from a checkpoint beside its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shared.errors import ConfigurationError


def from_pretrained(auto_class: Any, model: str, **options: Any) -> Any:
    """``auto_class.from_pretrained`` of transformers.

    Raises:
        ConfigurationError: in one line, whatever a checkpoint's files can cause.
    """
    try:
        return auto_class.from_pretrained(model, **options)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigurationError(
            f"{model} does not load with {auto_class.__name__}: {reason}"
        ) from error


def local_folder(model: str) -> Path:
    """The folder of a model on disk: its own, or that of the Hub's cache."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, local_files_only=True))


def eos_token_ids(generation_config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end a completion, ascending: the generation config's and the tokenizer's."""
    configured = generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return tuple(sorted({int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None}))
