"""The tokens that end a completion, in conversations and in plain text."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import GenerationConfig, PreTrainedTokenizerBase

from shared.errors import DatasetError
from shared.protocol import InfoResponse


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None
) -> list[int]:
    """Return the tokens that end a completion; the first is appended to completions without one.

    The first is the tokenizer's EOS, or else the model's; the model's others follow, sorted.

    Raises:
        DatasetError: there is no such token, so no completion could ever end.
    """
    own = sorted(_configured(generation_config))
    ids = own if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id), *own]
    distinct = list(dict.fromkeys(ids))
    if not distinct:
        raise DatasetError("the tokenizer has no EOS token; set one, completions must end")
    return distinct


def text_end_id(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None
) -> int | None:
    """Return the token that ends plain text, or None where it is the first of `stop_token_ids`.

    A base model may come with the tokenizer of its chat model, whose EOS ends a turn: Gemma 3's is
    ``<end_of_turn>``, which the base model never writes. The token that ends its texts is in its
    own generation configuration.
    """
    own = _configured(generation_config)
    if not own or tokenizer.eos_token_id in own:
        return None
    return own[0]


def compare_ends(
    tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], info: InfoResponse
) -> str | None:
    """Return a warning where the teacher ends completions with a token that the student does not.

    The usual case is a base student with a chat teacher: the teacher writes ``<|im_end|>``, at
    which the student's own completions do not stop, so they run to the length limit.
    """
    main = info.tokenizer.special_token_ids.get("eos_token")
    theirs = list(info.eos_token_ids) if main is None else [main]
    missing = [i for i in theirs if i not in stop_ids and i < len(tokenizer)]
    if not missing or (main is None and set(theirs) & set(stop_ids)):
        return None
    end, own = (str(tokenizer.convert_ids_to_tokens(i)) for i in (missing[0], stop_ids[0]))
    return (
        f"the teacher ends its completions with {end!r}, at which the student's do not end (they "
        f"end with {own!r}): the student's completions would run to --max_new_tokens. Pass "
        f"--eos_token '{end}', unless that is meant"
    )


def _configured(generation_config: GenerationConfig | None) -> list[int]:
    configured = getattr(generation_config, "eos_token_id", None)
    own = configured if isinstance(configured, list) else [configured]
    return [int(i) for i in own if i is not None]
