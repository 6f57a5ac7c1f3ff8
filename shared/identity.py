"""Compute fingerprints that identify tokenizers and teachers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from shared.protocol import TokenizerIdentity
from shared.text import encoded
from shared.tokenizer_file import PROBES

# The version of `encoding_fingerprint`, raised with every change of `PROBES`.
ENCODING_VERSION = 1

_BLOCK = 1 << 20
_BLOCKS_PER_FILE = 64
_MODEL_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt")


def vocabulary_fingerprint(vocabulary: Mapping[str, int]) -> str:
    """Return the SHA-256 (hex) of the sorted (token, id) pairs, special tokens included.

    Each pair is hashed as JSON, so no token can be confused with a separator.
    """
    digest = hashlib.sha256()
    for token, token_id in sorted(vocabulary.items()):
        digest.update(json.dumps([token, int(token_id)], ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()


def encoding_fingerprint(tokenizer: Any) -> str:
    """Return a version and, for each of `PROBES`, 32 bits (hex) of the SHA-256 of its ids.

    Tokenizers of one vocabulary with equal fingerprints encode these texts alike, however they were
    loaded: only ids are compared, without special tokens around them. A text that a tokenizer
    refuses counts as no tokens.
    """
    marks = [_mark(tokenizer, text) for text in PROBES]
    return ":".join([str(ENCODING_VERSION), *marks])


def parting_text(ours: str, theirs: str) -> str | None:
    """Return the first of `PROBES` that two tokenizers encode differently, or None.

    Raises:
        ValueError: the fingerprints are of different versions and cannot be compared.
    """
    mine, other = ours.split(":"), theirs.split(":")
    if mine[0] != other[0] or len(mine) != len(other):
        raise ValueError(f"encodings of versions {mine[0]} and {other[0]}")
    pairs = zip(PROBES, mine[1:], other[1:], strict=True)
    return next((text for text, a, b in pairs if a != b), None)


def _mark(tokenizer: Any, text: str) -> str:
    try:
        ids = encoded(tokenizer, text)
    except Exception:  # tokenizers raises it where a vocabulary without unk lacks a word
        ids = []
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:8]


def tokenizer_identity(tokenizer: Any) -> TokenizerIdentity:
    """Return the identity of a transformers tokenizer."""
    vocabulary = {**tokenizer.get_vocab(), **tokenizer.get_added_vocab()}
    special = {
        name: tokenizer.convert_tokens_to_ids(token)
        for name, token in sorted(tokenizer.special_tokens_map.items())
        if isinstance(token, str)
    }
    template = getattr(tokenizer, "chat_template", None)
    return TokenizerIdentity(
        fingerprint=vocabulary_fingerprint(vocabulary),
        vocab_size=len(vocabulary),
        special_token_ids=special,
        chat_template=template if isinstance(template, str) else None,
        encoding=encoding_fingerprint(tokenizer),
    )


def model_fingerprint(folder: str | Path) -> str:
    """Return the SHA-256 (hex) of a model folder's configuration and weight files.

    Files up to 64 MiB are read whole. Of a larger one its size and 64 evenly spaced blocks of 1 MiB
    are read, so that a 66 GB teacher is identified in seconds. Training changes every block; an
    edit of single bytes between the blocks goes unseen.

    Raises:
        FileNotFoundError: the folder holds no configuration.
    """
    folder = Path(folder)
    files = sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern)})
    if folder / "config.json" not in files:
        raise FileNotFoundError(f"{folder} has no config.json")
    digest = hashlib.sha256()
    _add_files(digest, files)
    return digest.hexdigest()


def adapter_fingerprint(base: str, folder: str | Path) -> str:
    """Return the SHA-256 (hex) of a base model's fingerprint and an adapter's files.

    Raises:
        FileNotFoundError: the folder holds no adapter.
    """
    files = sorted(path for path in Path(folder).glob("adapter_*") if path.is_file())
    if Path(folder) / "adapter_config.json" not in files:
        raise FileNotFoundError(f"{folder} has no adapter_config.json")
    digest = hashlib.sha256(base.encode())
    _add_files(digest, files)
    return digest.hexdigest()


def _add_files(digest: Any, files: Iterable[Path]) -> None:
    """Add the names, sizes and contents of files to a digest; of large ones, blocks."""
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for offset in _block_offsets(size):
                file.seek(offset)
                digest.update(file.read(_BLOCK))


def _block_offsets(size: int) -> list[int]:
    if size <= _BLOCK * _BLOCKS_PER_FILE:
        return list(range(0, size, _BLOCK))
    last = size - _BLOCK
    return [last * i // (_BLOCKS_PER_FILE - 1) for i in range(_BLOCKS_PER_FILE)]
