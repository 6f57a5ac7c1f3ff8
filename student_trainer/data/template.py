"""A conversation as the chat template prints it: what is prompt, what is learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import GenerationConfig, PreTrainedTokenizerBase

from shared.errors import DatasetError, RowTooLongError
from student_trainer.data.sample import Sample


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None
) -> list[int]:
    """Tokens that end a completion; the first is appended where a completion lacks its end.

    That is the tokenizer's EOS, or without one the model's own; the model's others follow, sorted.

    Raises:
        DatasetError: there is none, so no completion could ever end.
    """
    configured = getattr(generation_config, "eos_token_id", None)
    own = configured if isinstance(configured, list) else [configured]
    ids = [tokenizer.eos_token_id, *sorted(int(i) for i in own if i is not None)]
    distinct = list(dict.fromkeys(int(i) for i in ids if i is not None))
    if not distinct:
        raise DatasetError("the tokenizer has no EOS token; set one, completions must end")
    return distinct


def _require_template(where: str, tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise DatasetError(
            f"{where}: the row is a conversation but the tokenizer has no chat template; set "
            "tokenizer.chat_template, or give prompt and completion as plain text"
        )


def _render(
    where: str,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    **options: Any,
) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:
        raise DatasetError(f"{where}: the chat template refuses the messages: {error}") from error
    return str(text)


def _completion_ids(
    where: str,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    prompt_text: str,
    stop_ids: Sequence[int],
) -> list[int]:
    """The last turn's tokens, up to and with its end token."""
    text = _render(where, tokenizer, messages)
    if not text.startswith(prompt_text):
        raise DatasetError(
            f"{where}: rendered with its completion, the conversation does not begin with the "
            "prompt (the template rewrites earlier turns), so the completion cannot be told from "
            "it. Give the row as prompt and completion in plain text, or use a template with "
            "{% generation %} markers and --assistant_only_loss"
        )
    if not str(messages[-1].get("content") or "").strip() and not messages[-1].get("tool_calls"):
        raise DatasetError(f"{where}: the completion is empty; there is nothing to learn")
    completion = text[len(prompt_text) :]
    ids = _ids(tokenizer, completion)
    ends = [i for i, token in enumerate(ids) if token in set(stop_ids)]
    if ends:
        return ids[: ends[0] + 1]  # templates print a newline after the end of the turn
    for token in tokenizer.all_special_tokens:
        if completion.rstrip().endswith(token):
            raise DatasetError(
                f"{where}: the chat template ends the assistant's turn with {token!r}, which ends "
                f"no completion here (EOS is {tokenizer.eos_token!r}): generated completions would "
                f"run to their limit. Pass --eos_token '{token}'"
            )
    return [*ids, stop_ids[0]]


def _all_assistant_turns(
    where: str,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    max_length: int,
) -> Sample:
    template = str(tokenizer.chat_template)
    if "generation" not in template or "endgeneration" not in template:
        raise DatasetError(
            f"{where}: --assistant_only_loss needs a chat template that marks what the assistant "
            "wrote with {% generation %} … {% endgeneration %}; this one does not"
        )
    rendered = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids = np.asarray(rendered["input_ids"], dtype=np.uint32)
    mask = np.asarray(rendered["assistant_masks"], dtype=bool)
    learned = np.flatnonzero(mask)
    if not len(learned) or learned[0] == 0:
        raise DatasetError(f"{where}: no assistant token follows another token; nothing to learn")
    start, end = int(learned[0]), int(learned[-1]) + 1
    if start >= max_length:
        raise RowTooLongError(
            f"{where}: the first assistant turn begins at token {start}, beyond the limit of "
            f"{max_length}"
        )
    cut = min(end, max_length)
    return Sample(ids[:cut], start, mask[start:cut], "dataset", truncated=cut < end)


def _ids(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = False
) -> list[int]:
    return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
