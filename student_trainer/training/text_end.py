"""The end token of a base model that learns plain text."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class KeepEndTokens(TrainerCallback):
    """A callback that gives a model its own end tokens back after the Trainer has changed them.

    At the start the Trainer makes the tokenizer's EOS the first end token of the model. A base
    model that comes with the tokenizer of its chat model never writes that token in plain text,
    and a folder that names it would teach the next run to end text with it.
    """

    def __init__(self, model: Any) -> None:
        self._kept = [
            (config, config.eos_token_id)
            for config in (model.config.get_text_config(), model.generation_config)
            if config is not None
        ]

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        for config, eos_token_id in self._kept:
            config.eos_token_id = eos_token_id
