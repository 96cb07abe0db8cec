"""Assembly: an inventory and a routing make one ordinary low-rank adapter (letters: docs/notation.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from server.adapters.inventory import Inventory
from server.adapters.routing import routing_weights
from server.errors import InvalidInput


@dataclass(frozen=True)
class LowRank:
    """One linear's adapter: y += scaling * (x A) B."""

    A: Tensor  # (d_in, r)
    B: Tensor  # (r, d_out)


@dataclass(frozen=True)
class Mixture:
    """What an adapter was assembled from."""

    inventory: Inventory
    weights: Tensor  # (L, h, K) of each skill


@dataclass(frozen=True)
class Adapter:
    """A plain LoRA over named linears, fp32, with the scaling not yet folded into B."""

    weights: Mapping[str, LowRank]
    alpha: float
    rank: int
    mixture: Mixture | None = None  # that it equals

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    @property
    def num_bytes(self) -> int:
        mixture = 0 if self.mixture is None else self.mixture.weights.nbytes
        return mixture + sum(w.A.nbytes + w.B.nbytes for w in self.weights.values())


def mix(A: Tensor, B: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mix stacked skills with per-head weights, A and B separately, and join the heads.

    A (G, h, K, d_in/h, r), B (G, h, K, r, d_out/h), weights (N, G, h, K) for G linears and N tasks
    -> A (N, G, d_in, r), B (N, G, r, d_out).
    Source: Caccia et al. 2023 (arXiv 2211.03831), section 3.1; per head q, A_t[q] = sum_k w[q,k] A[q,k].
    """
    num_linears, num_heads, _, d_in, rank = A.shape
    d_out = B.shape[-1]
    mixed_A = torch.einsum("nghk,ghkdr->nghdr", weights, A)  # (N, G, h, d_in/h, r)
    mixed_B = torch.einsum("nghk,ghkro->ngrho", weights, B)  # (N, G, r, h, d_out/h): heads side by side as columns
    shape = (weights.shape[0], num_linears)
    return mixed_A.reshape(*shape, num_heads * d_in, rank), mixed_B.reshape(*shape, rank, num_heads * d_out)


def assemble(inventory: Inventory, logits: Tensor) -> Adapter:
    """The adapter that a routing (L, h, K) makes of the inventory, in fp32.

    Raises InvalidInput when the routing's shape is not the inventory's.
    """
    if tuple(logits.shape) != inventory.routing_shape:
        raise InvalidInput(
            f"the routing has shape {tuple(logits.shape)}, the inventory needs {inventory.routing_shape}"
        )
    weights = routing_weights(logits.float())
    assembled: dict[str, LowRank] = {}
    for group in inventory.groups:
        A, B = mix(group.A, group.B, weights[None, list(group.rows)])
        for place, linear in enumerate(group.linears):
            assembled[linear] = LowRank(A[0, place], B[0, place])
    in_order = {linear: assembled[linear] for linear in inventory.linears}
    return Adapter(in_order, alpha=inventory.alpha, rank=inventory.rank, mixture=Mixture(inventory, weights))


def mean_adapter(inventory: Inventory) -> Adapter:
    """The mu form: the adapter of uniform weights, which is exactly the routing Z = 0."""
    return assemble(inventory, torch.zeros(inventory.routing_shape))


def side_by_side(first: Adapter, second: Adapter) -> Adapter:
    """The adapter of the same linears that adds to each output what both add; its rank is the sum of theirs."""
    scaling = first.scaling
    pairs: dict[str, LowRank] = {}
    for linear, one in first.weights.items():
        other = second.weights[linear]
        B = torch.cat((one.B, other.B * (second.scaling / scaling)))
        pairs[linear] = LowRank(torch.cat((one.A, other.A), dim=1), B)
    rank = first.rank + second.rank
    return Adapter(pairs, alpha=scaling * rank, rank=rank)
