"""The makers of tokenizers with the rules of published SentencePiece models."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

_SPACE = "\u2581"
_CORPUS = [
    "def add(a, b):\n    return a + b\n",
    "for i in range(10):\n        if x > i and y < len(items):\n            continue\n",
    "The quick brown fox jumps over the lazy dog. It is what it is, and that is all there is.",
    "numbers 0 1 2 3 4 5 6 7 8 9 100 200 \"quoted\" 'words' [list] {dict} (call) x == y != z",
] * 4
KINDS = ("llama-2", "metaspace-first", "metaspace-always", "yi")


@cache
def sentencepiece(kind: str) -> PreTrainedTokenizerFast:
    """Return a small BPE tokenizer with byte fallback: ASCII in its vocabulary, all else as bytes.

    Args:
        kind: llama-2 (a space before every text, by a normalizer), metaspace-first (Mistral),
            metaspace-always (CodeLlama), or yi (no space in front).
    """
    vocabulary, merges = _trained()
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    replace = normalizers.Replace(" ", _SPACE)
    if kind == "llama-2":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace])
    elif kind == "yi":
        tokenizer.normalizer = replace
    else:
        scheme = kind.removeprefix("metaspace-")
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            _SPACE, prepend_scheme=scheme, split=False
        )
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind != "yi":
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<s>", "</s>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@cache
def _trained() -> tuple[dict[str, int], list[tuple[str, str]]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=[_SPACE, *(chr(c) for c in range(33, 127))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    known = list(filter(_is_piece, sorted(model["vocab"], key=model["vocab"].get)))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *known]
    merges = [tuple(pair) for pair in model["merges"] if _is_piece("".join(pair))]
    return {token: i for i, token in enumerate(tokens)}, merges


def _is_piece(token: str) -> bool:
    """Return whether a token is a part of a word, or spaces; a newline is a byte in all kinds."""
    return "\n" not in token and _SPACE not in token.lstrip(_SPACE)
