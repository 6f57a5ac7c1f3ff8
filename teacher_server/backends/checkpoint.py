"""Load what every backend reads from a checkpoint beside its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shared.errors import ConfigurationError
from shared.tokenizer_file import verified_tokenizer


def from_pretrained(auto_class: Any, model: str, **options: Any) -> Any:
    """Call ``auto_class.from_pretrained`` of transformers, with every error in one line.

    Raises:
        ConfigurationError: the checkpoint does not load.
    """
    try:
        return auto_class.from_pretrained(model, **options)
    except Exception as error:
        what = model
        if not Path(model).is_dir():
            what = f"folder {model} does not exist, and as a Hub id it"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigurationError(
            f"{what} does not load with {auto_class.__name__}: {reason}"
        ) from error


def load_tokenizer(model: str, *, trust_remote_code: bool) -> Any:
    """Return the tokenizer of a checkpoint, which does what its ``tokenizer.json`` says.

    Raises:
        ConfigurationError: it does not load, or it loses text.
    """
    # Imported here, so that the command line does not wait for transformers.
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    options = {"trust_remote_code": trust_remote_code}
    return verified_tokenizer(
        from_pretrained(AutoTokenizer, model, **options),
        _tokenizer_file(model),
        lambda: from_pretrained(PreTrainedTokenizerFast, model, **options),
        name=model,
    )


def _tokenizer_file(model: str) -> Path | None:
    from transformers.utils import cached_file

    try:
        file = cached_file(model, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    except OSError:  # the Hub does not answer, and its cache lacks the file
        return None
    return None if file is None else Path(file)


def local_folder(model: str) -> Path:
    """Return the folder of a model on disk: its own, or the one in the Hub's cache."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, local_files_only=True))


def eos_token_ids(generation_config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that end a completion, ascending, of generation config and tokenizer."""
    configured = generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return tuple(sorted({int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None}))
