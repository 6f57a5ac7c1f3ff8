"""The served model's tokenizer: prompts and conversations as token ids, and tokens as text."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np

from shared.errors import InvalidRequestError
from shared.protocol import InfoResponse
from shared.text import token_text
from teacher_server.backends.checkpoint import load_tokenizer
from teacher_server.openai.schema import ChatRequest, CompletionRequest, Ids

# The most characters of a prompt for each token of the context; more are not tokenized.
MAX_CHARACTERS_PER_TOKEN = 16
# Characters of a long text that are tokenized at a time, to refuse it before all of it is.
_PIECE = 1 << 15


class ServedTokenizer:
    """The tokenizer of one model, loaded at the first request because most servers need none."""

    def __init__(self, model: str, *, trust_remote_code: bool) -> None:
        self._model = model
        self._trust_remote_code = trust_remote_code
        # token id -> its text
        self.token = functools.lru_cache(maxsize=1 << 18)(self._decode_one)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the model, as transformers loads it."""
        return load_tokenizer(self._model, trust_remote_code=self._trust_remote_code)

    def _decode_one(self, token_id: int) -> str:
        return token_text(self.tokenizer, token_id)

    def encode_prompts(self, request: CompletionRequest, info: InfoResponse) -> list[Ids]:
        """Return the token ids of each prompt, which may be text or ids.

        Raises:
            InvalidRequestError: a text is too long to be worth tokenizing, or is not valid Unicode.
        """
        texts = [prompt for prompt in request.prompt if isinstance(prompt, str)]
        for text in texts:
            _check_length(len(text), info.max_model_len, "context", "prompt")
        _check_length(sum(map(len, texts)), info.limits.max_tokens, "request", "prompt")
        for text in texts:
            check_text(text, "prompt")
        return [
            self._ids(prompt, info, "prompt", request.add_special_tokens)
            if isinstance(prompt, str)
            else prompt
            for prompt in request.prompt
        ]

    def _ids(self, text: str, info: InfoResponse, field: str, add_special_tokens: bool) -> Ids:
        """Return the token ids of a text.

        A long text is tokenized in pieces first, whose tokens are nearly its own: twice as many as
        the context takes are enough to refuse it.

        Raises:
            InvalidRequestError: the text is longer than the context.
        """
        context = info.max_model_len
        if len(text) > max(_PIECE, 2 * context):
            tokens = 0
            for start in range(0, len(text), _PIECE):
                tokens += len(self._piece(text[start : start + _PIECE], add_special_tokens=False))
                if tokens > 2 * context:
                    raise InvalidRequestError(
                        f"over {context} tokens; the teacher's context is {context}", field=field
                    )
        return np.array(self._piece(text, add_special_tokens), dtype=np.uint32)

    def _piece(self, text: str, add_special_tokens: bool) -> list[int]:
        encoded = self.tokenizer(
            text, add_special_tokens=add_special_tokens, return_attention_mask=False,
            return_token_type_ids=False,
        )  # fmt: skip
        ids: list[int] = encoded["input_ids"]
        return ids

    def render(self, request: ChatRequest, info: InfoResponse) -> Ids:
        """Return the token ids of a conversation under the model's chat template.

        Raises:
            InvalidRequestError: the template refuses it, or it is too long.
        """
        apply = self.tokenizer.apply_chat_template
        options = request.chat_template_kwargs or {}
        reserved = sorted(options.keys() & inspect.signature(apply).parameters.keys())
        if reserved:
            raise InvalidRequestError(
                f"chat_template_kwargs {reserved[0]!r} is not the template's to read",
                field="chat_template_kwargs",
            )
        messages = [message.to_template() for message in request.messages]
        characters = sum(len(text) for message in messages for text in message.values())
        _check_length(characters, info.max_model_len, "context", "messages")
        try:
            text = apply(messages, add_generation_prompt=True, tokenize=False, **options)
        except Exception as error:  # whatever the checkpoint's template raises
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {error}", field="messages"
            ) from error
        _check_length(len(text), info.max_model_len, "context", "messages")
        check_text(text, "messages")
        return self._ids(text, info, "messages", add_special_tokens=False)


def check_text(text: str, field: str) -> None:
    """Refuse text with a lone surrogate, which JSON can escape and no tokenizer takes.

    Raises:
        InvalidRequestError: names the field.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{text[error.start]!r} is half a character: a surrogate without its other half",
            field=field,
        ) from None


def _check_length(characters: int, tokens: int, of: str, field: str) -> None:
    """Refuse a text that is too long to be worth tokenizing.

    Raises:
        InvalidRequestError: over `MAX_CHARACTERS_PER_TOKEN` characters for each of ``tokens``.
    """
    limit = tokens * MAX_CHARACTERS_PER_TOKEN
    if characters > limit:
        raise InvalidRequestError(
            f"{characters} characters; the limit is {limit}, {MAX_CHARACTERS_PER_TOKEN} for each "
            f"of the {tokens} tokens of the {of}. Shorten the text, or send token ids",
            field=field,
        )
