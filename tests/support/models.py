"""The makers of tiny tokenizers and models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>{% generation %}"
    "{{ m['content'] }}<|end|>{% endgeneration %}{% else %}<|user|>{{ m['content'] }}<|end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# Options of tiny models, by family, whose positions, states or caches are unlike Llama's.
LONGROPE: dict[str, Any] = {
    "original_max_position_embeddings": 24,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 24,
        "short_factor": [1.0] * 4, "long_factor": [4.0, 8.0, 16.0, 32.0], "factor": 10.0,
    },
}  # fmt: skip
DYNAMIC: dict[str, Any] = {
    "max_position_embeddings": 24,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
}
STATEFUL: dict[str, dict[str, Any]] = {
    "rwkv": {"attention_hidden_size": 32, "context_length": 256},
    "recurrent_gemma": {
        "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8, "head_dim": 8,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "minimax": {
        "num_local_experts": 2, "head_dim": 8, "block_size": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
}  # fmt: skip


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Save a byte-level tokenizer of 260 tokens with a chat template that marks generations."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=260,
        special_tokens=["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(folder)
    return fast


def save_model(
    folder: Path,
    *,
    family: str = "llama",
    vocab_size: int = 260,
    seed: int = 0,
    hidden_size: int = 32,
    **config: Any,
) -> None:
    """Save a random 2-layer model of ``family`` (llama, qwen2, gemma2, …) in float32."""
    options = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "initializer_range": 0.2,  # far from uniform, so that a wrong answer shows
        **config,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))
    model.save_pretrained(folder)


def small_model() -> LlamaForCausalLM:
    """Return a random model of 64 tokens, far from uniform and always the same."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config)
