"""The memory tables of docs/tutorials/own-gpu.md, from the trainer's own estimate.

    python docs/reference/memory_table.py

Sizes are those of the Qwen2.5 family. No weights are loaded.
"""

from __future__ import annotations

import sys
import tempfile
from types import SimpleNamespace
from typing import Any

from transformers import Qwen2Config

from student_trainer.config.arguments import AdapterArguments, ModelArguments
from student_trainer.training.memory import Memory, estimate_memory

# Name: hidden size, feed-forward size, layers, heads, key-value heads, tokens, tied output layer.
SIZES = {
    "0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936, True),
    "3B": (2048, 11_008, 36, 16, 2, 151_936, True),
    "7B": (3584, 18_944, 28, 28, 4, 152_064, False),
    "14B": (5120, 13_824, 48, 40, 8, 152_064, False),
    "32B": (5120, 27_648, 64, 40, 8, 152_064, False),
    "72B": (8192, 29_568, 80, 64, 8, 152_064, False),
}
CARDS = (24, 48, 80, 141)  # GB
_BF16 = {"torch_dtype": "bfloat16"}
# Title of a column: options of the model, options of the adapters, --bf16.
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "QLoRA": (_BF16, {"use_peft": True, "load_in_4bit": True}, True),
    "LoRA": (_BF16, {"use_peft": True}, True),
    "full, bfloat16": (_BF16, {}, True),
    "full, float32": ({"torch_dtype": "float32"}, {}, True),
}
_TOKENS = 4096  # learned in a micro-batch; the loss holds at most a chunk of logits anyway
_CARD = 80 * 10**9  # whose chunks are the largest; smaller cards have smaller ones


def estimate(size: str, way: str) -> Memory:
    """Return the trainer's estimate for a size and a way of training, on one device."""
    hidden, inner, layers, heads, key_value, vocab, tied = SIZES[size]
    config = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value,
        vocab_size=vocab,
        tie_word_embeddings=tied,
    )
    of_model, of_adapters, bf16 = WAYS[way]
    args: Any = SimpleNamespace(
        bf16=bf16, fp16=False, gradient_checkpointing=True, world_size=1, n_gpu=1, fsdp=None,
        deepspeed=None, torch_compile=False, optim="adamw_torch", optim_args=None,
        optim_target_modules=None, learning_rate=1e-5, adam_beta1=0.9, adam_beta2=0.999,
        adam_epsilon=1e-8, weight_decay=0.0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        model = ModelArguments(model_name_or_path=folder, **of_model)
        return estimate_memory(
            model, AdapterArguments(**of_adapters), args, tokens=_TOKENS, card=_CARD
        )


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f}" if size < 1e10 else f"{size / 1e9:.0f}"


def table() -> list[str]:
    """Return the table of a step's memory in GB, without activations."""
    lines = [
        "| model | weights to serve, bfloat16 | " + " | ".join(WAYS) + " |",
        "| --- |" + " --- |" * (len(WAYS) + 1),
    ]
    for size in SIZES:
        memories = [estimate(size, way) for way in WAYS]
        cells = [gigabytes(2 * memories[-1].parameters), *(gigabytes(m.total) for m in memories)]
        lines.append(f"| {size} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    sys.stdout.write("\n".join(table()) + "\n")
