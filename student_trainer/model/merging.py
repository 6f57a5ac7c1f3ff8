"""The merging of adapters into their base model, checked against the adapted model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from shared.errors import ConfigurationError

# Largest mean difference in log-prob that rounding in this dtype explains.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.25}
_PROBE_TOKENS = 16


def merge_adapters(adapted: Any) -> Any:
    """Return the plain model that computes what the adapted one computes.

    If adapters change the output layer or the embedding of a model that ties them, the merged model
    has two weights, and its configuration says so.

    Args:
        adapted: a peft model; its weights are changed.

    Raises:
        ConfigurationError: the log-probs of the merged model differ from the adapted one's.
    """
    expected = probe_logprobs(adapted)
    causal_lm = adapted.get_base_model()
    if adapts_tied_weights(causal_lm):
        untie(causal_lm)
    merged = adapted.merge_and_unload()
    require_same_logprobs(expected, probe_logprobs(merged), "merging the adapters")
    return merged


def adapts_tied_weights(causal_lm: Any) -> bool:
    """Return whether adapters change the output layer or embedding of a model that ties them."""
    layers = [causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()]
    if None in layers or not any(_is_adapted(layer) for layer in layers):
        return False
    return bool(causal_lm.config.get_text_config().tie_word_embeddings)


def untie(causal_lm: Any) -> None:
    """Give the output layer its own copy of the embedding's weight.

    The configuration is changed too, so that the model is saved and loaded with both.
    """
    output = _inner(causal_lm.get_output_embeddings())
    if output.weight is _inner(causal_lm.get_input_embeddings()).weight:
        output.weight = nn.Parameter(output.weight.detach().clone(), requires_grad=False)
    for config in (causal_lm.config, causal_lm.config.get_text_config()):
        config.tie_word_embeddings = False
    causal_lm.all_tied_weights_keys = causal_lm.get_expanded_tied_weights_keys(all_submodels=True)


@torch.no_grad()
def probe_logprobs(model: Any) -> tuple[torch.Tensor, torch.dtype]:
    """Return log-probs [16, V] float32 on the CPU at a few tokens, and the weights' dtype."""
    training = model.training
    model.eval()
    try:
        vocab_size = model.get_input_embeddings().weight.shape[0]
        ids = torch.tensor([[(7 * i + 3) % vocab_size for i in range(_PROBE_TOKENS)]])
        ids = ids.to(next(model.parameters()).device)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    finally:
        model.train(training)
    dtype = next(model.parameters()).dtype
    return logits[0].float().log_softmax(-1).cpu(), dtype


def require_same_logprobs(
    expected: tuple[torch.Tensor, torch.dtype], found: tuple[torch.Tensor, torch.dtype], what: str
) -> None:
    """Check that log-probs differ by no more than rounding.

    The eight most probable tokens of each position are compared.

    Args:
        expected, found: results of `probe_logprobs`.
        what: the cause of a difference, for the message.

    Raises:
        ConfigurationError: they differ by more; names the difference.
    """
    top = expected[0].topk(min(8, expected[0].shape[-1])).indices
    change = float((expected[0].gather(1, top) - found[0].gather(1, top)).abs().mean())
    limit = max(_TOLERANCE.get(dtype, 0.25) for dtype in (expected[1], found[1]))
    if not change <= limit:
        raise ConfigurationError(
            f"{what} changed the model: its log-probs differ by {change:.2g} in the mean, and "
            f"rounding is at most {limit:g}. Merge in float32 (--dtype float32), or load the "
            "adapters with peft, unmerged"
        )


def _is_adapted(layer: Any) -> bool:
    return layer is not _inner(layer)


def _inner(layer: Any) -> Any:
    """Return the base model's layer inside a peft wrapper, or the layer itself."""
    for name in ("original_module", "base_layer"):
        layer = getattr(layer, name, layer)
    return layer
