"""One optimizer step of a student, by its way of training: it runs, its memory, its speed."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_parts import NotHereError
from benchmarks.gpu_parts.measure import MIB, Row, Rows, median_seconds, milliseconds
from benchmarks.gpu_parts.models import build, config_of, flops_a_token
from benchmarks.gpu_parts.roofline import card_named
from student_trainer.losses import Divergence, SparseDistribution
from student_trainer.model.forward import SparseTargets, install_sparse_loss

TOP_K = 64
LEARNED = 0.5  # of a sequence's tokens: its completion


def measure(
    device: str,
    *,
    shape: str,
    way: str = "full",
    sequences: int = 8,
    length: int = 1024,
    checkpointing: bool = True,
    packed: bool = False,
    compiled: bool = False,
) -> Rows:
    """Yield a row with time, tokens a second, MFU and peak memory of a step.

    Args:
        way: "full", "LoRA" or "QLoRA".
        packed: the sequences stand in one row, kept apart by flash attention.
        compiled: the model is compiled by torch.compile.

    Raises:
        NotHereError: a package or the card's memory is missing.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = _student(shape, way, device, dtype, checkpointing=checkpointing, packed=packed)
    install_sparse_loss(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device == "cuda")
    batch = _batch(model.config, device, sequences, length, packed=packed)
    forward: Callable[..., Any] = model
    if compiled:
        forward = torch.compile(model, backend="inductor" if device == "cuda" else "eager")
    losses = []

    def step() -> None:
        loss = forward(**batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken = median_seconds(step, device, budget=4.0, most=10)
    values = torch.stack(losses).tolist()
    tokens = sequences * length
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    work = tokens * flops_a_token(model.config, length, learned=LEARNED, trained=way == "full")
    row: Row = {
        "step": f"{shape} {way}" + _options(checkpointing, packed=packed, compiled=compiled),
        "tokens": tokens,
        "ms": milliseconds(taken),
        "tokens/s": round(tokens / taken),
        "peak MiB": torch.cuda.max_memory_allocated() // MIB if device == "cuda" else None,
        "MFU": round(work / taken / card_named(name).flops, 4),
        "loss, first and last": f"{values[0]:.4f} {values[-1]:.4f}",
    }
    if not all(map(math.isfinite, values)):
        row["loss, first and last"] = "NOT FINITE"
    yield row


def _options(checkpointing: bool, *, packed: bool, compiled: bool) -> str:
    said = {", checkpoints": checkpointing, ", packed": packed, ", compiled": compiled}
    return "".join(text for text, on in said.items() if on)


def _student(
    shape: str, way: str, device: str, dtype: torch.dtype, *, checkpointing: bool, packed: bool
) -> Any:
    attention = "flash_attention_2" if packed and device == "cuda" else "sdpa"
    try:
        if way == "QLoRA":
            return _quantised(shape, device, dtype, checkpointing=checkpointing)
        model = build(config_of(shape), device, dtype, attention)
        return model if way == "full" else _with_adapters(model, checkpointing)
    except ImportError as error:
        raise NotHereError(str(error).splitlines()[0]) from error


def _with_adapters(model: Any, checkpointing: bool) -> Any:
    from student_trainer.config.arguments import AdapterArguments, LoadedModel, ModelArguments
    from student_trainer.model.load import load_student

    arguments = ModelArguments("random weights")
    arguments.loaded = LoadedModel(model, None)
    adapters = AdapterArguments(use_peft=True)
    return load_student(arguments, adapters, gradient_checkpointing=checkpointing)


def _quantised(shape: str, device: str, dtype: torch.dtype, *, checkpointing: bool) -> Any:
    """Return a student on 4-bit weights, which only a checkpoint can be loaded to."""
    import bitsandbytes  # noqa: F401 - the message is shorter than that of transformers

    from student_trainer.config.arguments import AdapterArguments, ModelArguments
    from student_trainer.model.load import load_student

    with tempfile.TemporaryDirectory() as folder:
        build(config_of(shape), device, dtype).save_pretrained(folder)
        arguments = ModelArguments(folder, torch_dtype="bfloat16")
        adapters = AdapterArguments(use_peft=True, load_in_4bit=True)
        return load_student(arguments, adapters, gradient_checkpointing=checkpointing).to(device)


def _batch(config: Any, device: str, sequences: int, length: int, *, packed: bool) -> Row:
    """Return inputs and targets: the second half of each sequence is learned."""
    generator = torch.Generator(device).manual_seed(0)
    vocab_size = config.vocab_size
    ids = torch.randint(vocab_size, (sequences, length), generator=generator, device=device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if packed:
        places = torch.arange(length, device=device).repeat(1, sequences)
        inputs = {"input_ids": ids.flatten()[None], "position_ids": places}
    half = torch.arange(int(length * (1 - LEARNED)), length, device=device) - 1
    positions = (torch.arange(sequences, device=device)[:, None] * length + half).flatten()
    count = len(positions)
    first = torch.randint(vocab_size, (count, 1), generator=generator, device=device)
    support = (first + vocab_size // TOP_K * torch.arange(TOP_K, device=device)) % vocab_size
    drawn = torch.randn(count, TOP_K, generator=generator, device=device).log_softmax(dim=-1)
    tail = torch.full((count,), math.log(0.1), device=device)
    inputs["sparse_targets"] = SparseTargets(
        positions=positions,
        teacher=SparseDistribution(support, drawn + math.log(0.9), tail),
        divergence=Divergence(),
        normalizer=count,
        vocab_size=vocab_size,
    )
    return inputs
