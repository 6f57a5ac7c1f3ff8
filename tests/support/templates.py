"""The published chat templates on published tokenizers, and the turns of conversations."""

import copy
import datetime
import functools
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from student_trainer.config.arguments import DataArguments
from student_trainer.data.examples import RowTokenizer
from student_trainer.data.template import TemplateOptions
from tests.support.real import tokenizer_folder

TODAY = datetime.date(2026, 1, 2)
# By name: the tokenizer, TRL's name of the template (None for the tokenizer's own), the special
# tokens that the tokenizer lacks, and the end tokens.
TEMPLATES: dict[str, tuple[str, str | None, tuple[str, ...], tuple[str, ...]]] = {
    "qwen2.5": ("qwen3", "qwen2_5", (), ("<|im_end|>", "<|endoftext|>")),
    "qwen3": ("qwen3", None, (), ("<|im_end|>", "<|endoftext|>")),
    "qwen3-2507": ("qwen3", "qwen3_instruct_2507", (), ("<|im_end|>", "<|endoftext|>")),
    "qwen3.5": ("qwen3", "qwen3_5_think", (), ("<|im_end|>", "<|endoftext|>")),
    "qwen3.8": ("qwen3", "qwen3_8", (), ("<|im_end|>", "<|endoftext|>")),
    "nemotron-3-nano": ("qwen3", "nemotron_3_nano", (), ("<|im_end|>", "<|endoftext|>")),
    "nemotron-3-ultra": ("qwen3", "nemotron_3_ultra", (), ("<|im_end|>", "<|endoftext|>")),
    "glm-4.5": (
        "qwen3",
        "glm4moe",
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        ("<|endoftext|>", "<|user|>", "<|observation|>"),
    ),
    "phi-3": (
        "qwen3",
        "phi3",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        ("<|end|>", "<|endoftext|>"),
    ),
    "llama-3": ("llama3_1", None, (), ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")),
    "llama-3.1": ("llama3_1", "llama3_1", (), ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")),
    "llama-3.2": ("llama3_1", "llama3_2", (), ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")),
    "deepseek-v3": ("deepseek_v3", None, (), ("<｜end▁of▁sentence｜>",)),
    "deepseek-r1-distill": ("deepseek_v3", "deepseek_r1_distill", (), ("<｜end▁of▁sentence｜>",)),
    "gemma-3": ("gemma3", None, (), ("<end_of_turn>", "<eos>")),
    "gpt-oss": ("gptoss", "gptoss", (), ("<|return|>", "<|endoftext|>", "<|call|>")),
}

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Its name."},
                "days": {"type": "integer", "description": "How many."},
            },
            "required": ["city"],
        },
    },
}


def call(name: str = "get_weather", **arguments: Any) -> dict[str, Any]:
    """Return a tool call in OpenAI's form, its arguments as JSON text."""
    text = json.dumps(arguments, ensure_ascii=False)
    return {"id": "call00001", "type": "function", "function": {"name": name, "arguments": text}}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


@functools.cache
def _published(folder: str, tokens: tuple[str, ...]) -> PreTrainedTokenizerBase:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder(folder))
    if tokens:
        tokenizer.add_special_tokens({"extra_special_tokens": list(tokens)})
    return tokenizer


@functools.cache
def load(name: str) -> tuple[PreTrainedTokenizerBase, tuple[int, ...]]:
    """Return the tokenizer with one of `TEMPLATES`, and the ids that end a completion."""
    trl = pytest.importorskip("trl")
    folder, template, tokens, stops = TEMPLATES[name]
    tokenizer = copy.copy(_published(folder, tokens))
    if template is not None:
        file = Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja"
        tokenizer.chat_template = file.read_text()
    tokenizer.name_or_path = name
    return tokenizer, tuple(tokenizer.convert_tokens_to_ids(list(stops)))


def row_tokenizer(
    name: str, *, one_sequence: bool = False, kwargs: dict[str, Any] | None = None, **options: Any
) -> RowTokenizer:
    """Return the row tokenizer under one of `TEMPLATES`."""
    tokenizer, stop_ids = load(name)
    return RowTokenizer(
        tokenizer,
        stop_ids,
        DataArguments(**options),
        8192,
        TemplateOptions(kwargs or {}, TODAY),
        one_sequence,
    )
