"""Check that a tokenizer does what its ``tokenizer.json`` says, and that it loses no text.

transformers rebuilds some tokenizers from the vocabulary alone, with the rules of the class that a
configuration names (transformers issues 45488 and 48206): a byte-level one then loses spaces.
"""

from __future__ import annotations

import json
import logging
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.errors import ConfigurationError
from shared.text import decoded, difference, encoded, round_trip_change

logger = logging.getLogger(__name__)

# Changing a text changes every fingerprint, so raise `shared.identity.ENCODING_VERSION` with it.
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n    if x > 1:\n        return x + 1  # one more\n",
    "one  two   three    four\tfive\t\tsix\n\n\nseven \n eight",
    'He said: "It\'s 12,345.67, isn\'t it?" (yes!) ... {"a": [1, 2.5e-3]}',
    "3.14159 1000000 0x1F 2026-11-30 1+1=2 99% $5 #7 @x a_b camelCase HTTPServer",
    "naïve café, Ångström, Straße, señor, Łódź, İstanbul",
    "你好,世界。今天天气很好 こんにちは世界 안녕하세요 세계",
    "Привет, мир! Γειά σου Κόσμε שלום עולם مرحبا بالعالم नमस्ते สวัสดี",
    "🙂 👍🏽 👩‍💻 🇩🇪 ✓ → ∑ ½ “quoted” – — …",
    "line one\r\nline two\r\n\r\nend",
    "x = $\\frac{a}{b}$ <b>bold</b> https://example.org/a?b=c&d=e#f C:\\dir\\file.txt",
    "I'M DON'T we'll they've aaaaaaaaaaaaaaaa !!!!!!!! ======== --------",
)
# Classes that read ``add_bos_token`` in every version of transformers before 5.
_ADDS_BOS = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer")
# A vocabulary may lack the carriage return, because text with CRLF line ends is rare.
_MAY_LACK = "\r"


def verified_tokenizer(
    tokenizer: Any, file: Path | None, load_file: Callable[[], Any], *, name: str
) -> Any:
    """Return a tokenizer that does what its file says: the given one, or one loaded anew.

    Args:
        tokenizer: as transformers loaded it.
        file: its ``tokenizer.json``, if there is one.
        load_file: loads that file as it stands, with the rest of the configuration.
        name: of the checkpoint, for messages.

    Raises:
        ConfigurationError: text does not survive encoding and decoding.
    """
    if file is not None:
        found = differs_from_file(tokenizer, file)
        if found is not None:
            tokenizer, named = load_file(), type(tokenizer).__name__
            logger.warning(
                "%s: transformers' %s does not do what tokenizer.json says (%s); loaded "
                "tokenizer.json as it stands",
                name, named, found,
            )  # fmt: skip
            still = differs_from_file(tokenizer, file)
            if still is not None:
                raise ConfigurationError(
                    f"{name}: this transformers loads another tokenizer than tokenizer.json "
                    f"describes ({still}); install another version of transformers"
                )
        _add_lost_bos(tokenizer, file.with_name("tokenizer_config.json"), name)
    check_keeps_text(tokenizer, name=name)
    return tokenizer


def _add_lost_bos(tokenizer: Any, config: Path, name: str) -> None:
    """Make a tokenizer begin plain text with BOS if it was published as one that does.

    DeepSeek's ``tokenizer.json`` adds no token; up to transformers 4 the class that its
    configuration names did, because of ``add_bos_token``.
    """
    try:
        published = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    named = str(published.get("tokenizer_class")).removesuffix("Fast")
    if named not in _ADDS_BOS or published.get("add_bos_token") is not True:
        return
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("a")["input_ids"][:1] == [bos]:
        return
    tokenizer.add_bos_token = True
    logger.warning(
        "%s: tokenizer_config.json says add_bos_token, and this transformers adds none; plain text "
        "begins with %r here",
        name, tokenizer.bos_token,
    )  # fmt: skip


def check_keeps_text(tokenizer: Any, *, name: str) -> None:
    """Refuse a tokenizer that loses white space, or characters that are in its vocabulary.

    Raises:
        ConfigurationError: says which text came back changed.
    """
    unsayable: set[str] = set()
    for text in PROBES:
        try:
            back = round_trip_change(tokenizer, text)
        except Exception:  # tokenizers raises it where a vocabulary without unk lacks a word
            back = ""
        if back is None:
            continue
        missing = {char for char in set(text) if _lacks(tokenizer, char)}
        unsayable |= missing
        rest = "".join(char for char in text if char not in missing)
        back = round_trip_change(tokenizer, rest) if rest.strip() else None
        if back is not None:
            raise ConfigurationError(
                f"{name}: the tokenizer loses text: {difference(rest, back)}. Its files do not "
                "fit together: take tokenizer.json and tokenizer_config.json as published, or load "
                "it with PreTrainedTokenizerFast and save that"
            )
    if unsayable:
        logger.warning(
            "%s: the tokenizer cannot express %d of the %d characters it was tried with, %s among "
            "them",
            name, len(unsayable), len(set("".join(PROBES))), ascii(min(unsayable)),
        )  # fmt: skip


def differs_from_file(tokenizer: Any, file: Path) -> str | None:
    """Describe how a tokenizer differs from ``tokenizer.json``; return None if it does not.

    The ids of `PROBES`, the text decoded from them and the parts that encode text are compared.
    Special tokens around a text are not, because the configuration may set them beside the file.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    remote = type(tokenizer).__module__.startswith("transformers_modules")
    if backend is None or remote:
        return None
    own = type(backend).from_file(str(file))
    own.no_truncation()
    own.no_padding()
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        decodes = part == "decoder"
        mine, theirs = (_plain(getattr(one, part), decodes=decodes) for one in (backend, own))
        if mine != theirs:
            return f"its {part} is {_named(mine)}, not {_named(theirs)}"
    for rule in ("byte_fallback", "fuse_unk", "ignore_merges"):
        mine, theirs = (bool(getattr(one.model, rule, False)) for one in (backend, own))
        if mine != theirs:
            return f"{rule} is {mine}, not {theirs}"
    for text in PROBES:
        try:
            ids = own.encode(text, add_special_tokens=False).ids
        except Exception:  # a vocabulary without unk lacks a word
            continue
        if encoded(tokenizer, text) != ids:
            return f"it cuts {text[:24]!r} otherwise"
        if decoded(tokenizer, ids, skip_special_tokens=False) != own.decode(
            ids, skip_special_tokens=False
        ):
            return f"it decodes {text[:24]!r} otherwise"
    return None


def _lacks(tokenizer: Any, char: str) -> bool:
    """Return whether a vocabulary lacks a character; white space that vanishes is not lacking."""
    try:
        ids = encoded(tokenizer, char)
    except Exception:
        return True
    if getattr(tokenizer, "unk_token_id", None) in ids:
        return True
    if char.isspace() and char not in _MAY_LACK:
        return False
    back = decoded(tokenizer, ids, skip_special_tokens=False)
    return unicodedata.normalize("NFC", char) not in unicodedata.normalize("NFC", back)


def _plain(part: Any, *, decodes: bool) -> Any:
    """Return a part of a tokenizer as JSON, without options that change no text."""
    return None if part is None else _simple(json.loads(part.__getstate__()), decodes)


def _simple(value: Any, decodes: bool) -> Any:
    for inner in ("normalizers", "pretokenizers", "decoders"):
        if inner in value:
            simple = (_simple(one, decodes) for one in value[inner])
            parts = [one for one in simple if one is not None]
            return parts[0] if len(parts) == 1 else parts or None
    if decodes and value.get("type") == "ByteLevel":  # as a decoder it ignores its options
        return {"type": "ByteLevel"}
    kept = {name: one for name, one in value.items() if name != "trim_offsets"}
    if "prepend_scheme" in kept:  # older files state the option twice
        kept.pop("add_prefix_space", None)
    return kept


def _named(part: Any) -> str:
    if part is None:
        return "none"
    parts = part if isinstance(part, list) else [part]
    return "+".join(dict.fromkeys(str(one.get("type")) for one in parts))
