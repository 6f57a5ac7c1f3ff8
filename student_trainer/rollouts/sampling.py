"""The sampling of tokens from logits by inverse CDF, without computing the whole CDF."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

_BLOCK = 512  # tokens; about the square root of usual vocabularies


def sample_tokens(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the tokens at which the cumulative softmax passes the uniforms.

    A token of probability 0 is never returned. A cumulative sum in float64 over 150,000 tokens
    costs more than a small model's whole forward pass. So the mass of each block of tokens is
    summed first, in float32, and the cumulative sum in float64 runs over blocks, then over the
    tokens of one block.

    Args:
        logits: [B, V].
        uniforms: [B] float64 in [0, 1); ignored at temperature 0.
        temperature: divides the logits; 0 takes the most probable token.

    Returns:
        [B] int64; −1 where the logits are not finite.
    """
    logits = logits.float()
    best, winner = logits.max(dim=-1, keepdim=True)  # [B, 1]
    finite = best.isfinite()
    if temperature == 0:
        return torch.where(finite, winner, -1)[:, 0]
    weights = pad(((logits - best) / temperature).exp_(), (0, -logits.shape[1] % _BLOCK))
    blocks = weights.unflatten(1, (-1, _BLOCK))  # [B, V/512, 512]
    cdf = blocks.sum(dim=-1).double().cumsum(dim=-1)  # [B, V/512]
    block, rest = _search(cdf, uniforms[:, None] * cdf[:, -1:])
    within = blocks.gather(1, block[:, :, None].expand(-1, 1, _BLOCK))[:, 0]  # [B, 512]
    token, _ = _search(within.double().cumsum(dim=-1), rest)
    return torch.where(finite, block * _BLOCK + token, -1)[:, 0]


def _search(cdf: torch.Tensor, point: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first index [B, 1] where ``cdf`` [B, n] exceeds ``point`` [B, 1], and the rest.

    The rest is the point minus the CDF before that index. A point at or above the total, because of
    rounding, is put just below it. The search is from the right, so an index that adds no mass is
    never found.
    """
    total = cdf[:, -1:]
    point = torch.minimum(point, total.nextafter(torch.zeros_like(total)))
    index = torch.searchsorted(cdf, point, right=True)
    index = index.clamp(max=cdf.shape[1] - 1)  # it is too large only if the CDF is not finite
    return index, point - pad(cdf, (1, 0)).gather(1, index)
