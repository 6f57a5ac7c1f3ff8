"""The sampling of tokens from logits by inverse CDF, without computing the whole CDF."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from student_trainer.rollouts.base import NO_FILTER, TokenFilter

_BLOCK = 512  # tokens; about the square root of usual vocabularies


def sample_tokens(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: float,
    token_filter: TokenFilter = NO_FILTER,
) -> torch.Tensor:
    """Return the tokens at which the cumulative softmax passes the uniforms.

    A token of probability 0 is never returned. A cumulative sum in float64 over 150,000 tokens
    costs more than a small model's whole forward pass. So the mass of each block of tokens is
    summed first, in float32, and the cumulative sum in float64 runs over blocks, then over the
    tokens of one block.

    Args:
        logits: [B, V].
        uniforms: [B] float64 in [0, 1); ignored at temperature 0.
        temperature: divides the logits; 0 takes the most probable token.
        token_filter: leaves out tokens after that.

    Returns:
        [B] int64; −1 where the logits are not finite.
    """
    logits = logits.float()
    best, winner = logits.max(dim=-1, keepdim=True)  # [B, 1]
    finite = best.isfinite()
    if temperature == 0:
        return torch.where(finite, winner, -1)[:, 0]
    scaled = filter_logits((logits - best) / temperature, token_filter)
    weights = pad(scaled.exp_(), (0, -logits.shape[1] % _BLOCK))
    blocks = weights.unflatten(1, (-1, _BLOCK))  # [B, V/512, 512]
    cdf = blocks.sum(dim=-1).double().cumsum(dim=-1)  # [B, V/512]
    block, rest = _search(cdf, uniforms[:, None] * cdf[:, -1:])
    within = blocks.gather(1, block[:, :, None].expand(-1, 1, _BLOCK))[:, 0]  # [B, 512]
    token, _ = _search(within.double().cumsum(dim=-1), rest)
    return torch.where(finite, block * _BLOCK + token, -1)[:, 0]


def filter_logits(logits: torch.Tensor, token_filter: TokenFilter) -> torch.Tensor:
    """Return float32 logits [B, V] with −inf at the tokens that a filter leaves out.

    It changes no row by another: tokens of equal logits at the edge of top-p are kept in the order
    of their ids, the largest first. The most probable token is always kept.
    """
    if token_filter.min_p > 0:
        probabilities = logits.softmax(dim=-1)
        least = token_filter.min_p * probabilities.amax(dim=-1, keepdim=True)  # [B, 1]
        logits = logits.masked_fill(probabilities < least, -torch.inf)
    if 0 < token_filter.top_k < logits.shape[1]:
        last = logits.topk(token_filter.top_k, dim=-1).values[:, -1:]  # [B, 1]
        logits = logits.masked_fill(logits < last, -torch.inf)
    if token_filter.top_p < 1:
        logits = logits.masked_fill(~_in_top_p(logits, token_filter.top_p), -torch.inf)
    return logits


def _in_top_p(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return a mask [B, V] of the most probable tokens that together have ``top_p``.

    Sums are in float64, so that no edge depends on the order in which a device adds.
    """
    weights = (logits - logits.amax(dim=-1, keepdim=True)).exp().double()  # [B, V]
    total = weights.sum(dim=-1, keepdim=True)
    most = (1 - top_p) * total  # that may be left out
    # All tokens of so little weight are left out together, so only the others are sorted.
    count = max(1, int((weights > most / logits.shape[1]).sum(dim=-1).max()))
    places = logits.topk(count, dim=-1).indices.sort(dim=-1).values  # [B, C]
    order = logits.gather(1, places).sort(dim=-1, stable=True).indices
    places = places.gather(1, order)  # from the least probable on
    rising = weights.gather(1, places)
    below = total - rising.sum(dim=-1, keepdim=True)
    kept = below + rising.cumsum(dim=-1) > most
    kept[:, -1] = True
    return torch.zeros_like(logits, dtype=torch.bool).scatter(1, places, kept)


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
