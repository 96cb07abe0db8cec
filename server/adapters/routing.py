"""From routing logits Z to mixing weights w (letters: docs/notation.md)."""

from __future__ import annotations

import torch
from torch import Tensor

_EPSILON = 1e-12
INIT_RANGE = 1e-3


def routing_weights(logits: Tensor) -> Tensor:
    """Mixing weights (..., K) of routing logits (..., K): sigmoid, normalised over the skills.

    w[k] = sigmoid(Z[k]) / (sum_j sigmoid(Z[j]) + 1e-12). Not a softmax.
    Source: Ponti et al. 2023 (arXiv 2202.13914), section 2; Caccia et al. 2023 (arXiv 2211.03831), section 3.
    """
    return _normalise(torch.sigmoid(logits))


def routing_logits(weights: Tensor) -> Tensor:
    """Logits (..., K) whose `routing_weights` are the given weights (..., K); 0 where all are 1/K.

    Only the ratios of sigmoids matter: the largest is put at m / (m + 1/K), where m is the largest weight.
    """
    largest = weights.amax(dim=-1, keepdim=True)
    return torch.logit(weights / (largest + 1 / weights.shape[-1]))


def sample_routing_weights(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Noisy mixing weights (..., K): one draw of RelaxedBernoulli(temperature 1, logits), normalised.

    A relaxed Bernoulli of temperature 1 is sigmoid(Z + L) with L standard logistic.
    """
    uniform = torch.rand(logits.shape, generator=generator, dtype=logits.dtype, device=logits.device)
    uniform = uniform.clamp(_EPSILON, 1 - 1e-7)
    return _normalise(torch.sigmoid(logits + torch.log(uniform) - torch.log1p(-uniform)))


def fresh_routing(num_linears: int, num_heads: int, num_skills: int, generator: torch.Generator) -> Tensor:
    """Logits (L, h, K) uniform within ±1e-3, so that every weight is close to 1/K."""
    uniform = torch.rand((num_linears, num_heads, num_skills), generator=generator)
    return (uniform * 2 - 1) * INIT_RANGE


def one_hot_routing(num_linears: int, num_heads: int, num_skills: int, skill: int) -> Tensor:
    """Logits (L, h, K) whose weights are exactly one for `skill` and zero for the others."""
    logits = torch.full((num_linears, num_heads, num_skills), float("-inf"))
    logits[:, :, skill] = float("inf")
    return logits


def _normalise(scores: Tensor) -> Tensor:
    return scores / (scores.sum(dim=-1, keepdim=True) + _EPSILON)
