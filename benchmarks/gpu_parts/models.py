"""Models with random weights, in the shapes of the Qwen2.5 family, made on the device."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

# Hidden size, feed-forward size, layers, heads, key-value heads, tokens, tied output layer.
SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 1024, True),
    "0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "7B": (3584, 18_944, 28, 28, 4, 152_064, False),
}


def config_of(shape: str, **options: Any) -> Qwen2Config:
    hidden, inner, layers, heads, key_value, vocab, tied = SHAPES[shape]
    return Qwen2Config(
        **{
            "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": key_value, "vocab_size": vocab,
            "tie_word_embeddings": tied, "bos_token_id": None, "eos_token_id": 1,
            "pad_token_id": 0, "max_position_embeddings": 4096, **options,
        }
    )  # fmt: skip


def build(config: Qwen2Config, device: str, dtype: torch.dtype, attention: str = "sdpa") -> Any:
    """Return a model whose weights are drawn on the device, which takes a second for 7B."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


def flops_a_token(config: Any, length: int, *, learned: float, trained: bool) -> float:
    """Return the operations of a step's products for a token (Chinchilla, arXiv 2203.15556, F).

    Recomputation for gradient checkpoints is not counted, because it is no work of the model.

    Args:
        length: tokens of a sequence, of which a token sees half.
        learned: share of tokens for which the output layer is computed.
        trained: all weights get a gradient; else only states do, and small adapters.
    """
    head = config.vocab_size * config.hidden_size
    # Before adapters and quantisation, which change what a model's parameters are.
    inner = config.intermediate_size * config.hidden_size * 3
    key_value = config.hidden_size * config.num_key_value_heads // config.num_attention_heads
    layer = inner + 2 * config.hidden_size**2 + 2 * config.hidden_size * key_value
    products = config.num_hidden_layers * layer + learned * head
    attention = 2 * config.num_hidden_layers * config.hidden_size * length / 2
    return (6 if trained else 4) * products + 6 * attention
