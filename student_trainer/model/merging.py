"""Adapters into their base model, checked against the model that was trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from shared.errors import ConfigurationError

# Mean difference in log-prob that merging in this dtype may make by rounding.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.25}
_PROBE_TOKENS = 16


def merge_adapters(adapted: Any) -> Any:
    """Return the plain model that computes what the adapted one computes.

    Where adapters change the output layer or the embedding of a model that ties the two, the merged
    model has two weights, and its configuration says so: one cannot be both.

    Args:
        adapted: a peft model; its weights are changed.

    Raises:
        ConfigurationError: the merged model does not give the adapted one's log-probs.
    """
    expected = probe_logprobs(adapted)
    causal_lm = adapted.get_base_model()
    if adapts_tied_weights(causal_lm):
        untie(causal_lm)
    merged = adapted.merge_and_unload()
    require_same_logprobs(expected, probe_logprobs(merged), "merging the adapters")
    return merged


def adapts_tied_weights(causal_lm: Any) -> bool:
    """Whether adapters change one of two weights that the model shares."""
    layers = [causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()]
    if None in layers or not any(_is_adapted(layer) for layer in layers):
        return False
    return bool(causal_lm.config.get_text_config().tie_word_embeddings)


def untie(causal_lm: Any) -> None:
    """Give the output layer a weight of its own, equal to the embedding's, and say so in the
    configuration, so that the model is saved and loaded with both."""
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
        rows = model.get_input_embeddings().weight.shape[0]
        ids = torch.tensor([[(7 * i + 3) % rows for i in range(_PROBE_TOKENS)]])
        ids = ids.to(next(model.parameters()).device)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    finally:
        model.train(training)
    dtype = next(model.parameters()).dtype
    return logits[0].float().log_softmax(-1).cpu(), dtype


def require_same_logprobs(
    expected: tuple[torch.Tensor, torch.dtype], found: tuple[torch.Tensor, torch.dtype], what: str
) -> None:
    """Raises `ConfigurationError` where log-probs differ by more than rounding.

    Compared are the eight most probable tokens of each position.
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
    """The layer of the base model that a peft wrapper is around."""
    for name in ("original_module", "base_layer"):
        layer = getattr(layer, name, layer)
    return layer
