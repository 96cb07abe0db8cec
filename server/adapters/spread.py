"""Skills moved apart, so that routing alone reaches adapters that no mixture of them reached before.

Mixtures lie between the skills, and training leaves skills close to one another: a new task mostly lies outside.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from server.adapters.inventory import Inventory
from server.adapters.routing import routing_logits, routing_weights


def spread_skills(inventory: Inventory, factor: float) -> Inventory:
    """The same adapters from skills that stand `factor` >= 1 times as far from their mean.

    With the mean m over a head's K skills, A'[k] = m + factor (A[k] - m), B alike, and every routing has
    w'[k] = 1/K + (w[k] - 1/K) / factor. Then sum_k w'[k] A'[k] = sum_k w[k] A[k], because weights sum to 1, and the
    mean stays the mean. In return any weights whose departures from 1/K are up to `factor` times those of a mixture
    can be routed to, negative ones too.
    """
    return replace(
        inventory,
        A={linear: _move_apart(A, factor) for linear, A in inventory.A.items()},
        B={linear: _move_apart(B, factor) for linear, B in inventory.B.items()},
        routings={task: _move_together(logits, factor) for task, logits in inventory.routings.items()},
        spread=inventory.spread * factor,
    )


def scale_departures(weights: Tensor, factor: float) -> Tensor:
    """1/K + factor (w - 1/K) of mixing weights (..., K), which still sum to 1.

    With an inventory's `spread` as the factor: the weights over its skills as they were learnt.
    """
    even = 1 / weights.shape[-1]
    return even + factor * (weights - even)


def _move_apart(skills: Tensor, factor: float) -> Tensor:
    """skills (h, K, ., .), in fp32."""
    skills = skills.float()
    mean = skills.mean(dim=1, keepdim=True)
    return mean + factor * (skills - mean)


def _move_together(logits: Tensor, factor: float) -> Tensor:
    """logits (L, h, K)."""
    return routing_logits(scale_departures(routing_weights(logits.float()), 1 / factor))
