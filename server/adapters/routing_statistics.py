"""What the routings of an inventory's tasks look like, as numbers (formulas: docs/notation.md).

Letters: T tasks, L linears, h heads, K skills.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from server.adapters.inventory import Inventory
from server.adapters.routing import routing_weights
from server.adapters.spread import scale_departures


@dataclass(frozen=True)
class RoutingStatistics:
    """Statistics of the mixing weights of T tasks; `weights` is (T, L, h, K) in fp32, over the skills as learnt."""

    tasks: tuple[str, ...]
    weights: Tensor

    @classmethod
    def of(cls, inventory: Inventory) -> RoutingStatistics | None:
        """Of an inventory's own tasks; None when it brings no routing."""
        if not inventory.routings:
            return None
        logits = torch.stack([routing.float() for routing in inventory.routings.values()])
        weights = scale_departures(routing_weights(logits), inventory.spread)
        # A weight of nothing can have been rounded below it, and entropy is of numbers that are not negative.
        return cls(tuple(inventory.routings), weights.clamp_(min=0))

    @property
    def num_skills(self) -> int:
        return self.weights.shape[3]

    @cached_property
    def head_weights(self) -> Tensor:
        """(T, h, K), averaged over the linears."""
        return self.weights.mean(1)

    @cached_property
    def entropies(self) -> Tensor:
        """(T,) in nats: -sum_k w ln w, averaged over linears and heads; ln K where all skills weigh alike."""
        entropies: Tensor = torch.special.entr(self.weights).sum(-1)  # (T, L, h)
        return entropies.mean((1, 2))

    @cached_property
    def entropy_fractions(self) -> Tensor:
        """(T,) the entropies as fractions of ln K, between 0 and 1; 1 for a single skill, which has no choice."""
        return self.entropies / math.log(self.num_skills) if self.num_skills > 1 else torch.ones(len(self.tasks))

    @cached_property
    def similarities(self) -> Tensor:
        """(T, T) cosines between the tasks' departures w - 1/K, all linears, heads and skills as one vector.

        0 between routings that have nothing to do with each other. The plain weights' cosine would be high between
        any two, and highest for tasks that hardly route at all.
        """
        vectors = torch.nn.functional.normalize((self.weights - 1 / self.num_skills).flatten(1), dim=1)
        return vectors @ vectors.T

    @cached_property
    def skill_use(self) -> Tensor:
        """(L, h, K) each skill's weight, averaged over the tasks; 1/K where all are used alike."""
        return self.weights.mean(0)

    def as_document(self) -> dict[str, Any]:
        """The numbers for JSON: the entropy of each task and their mean, and the use of each skill."""
        per_task = zip(self.tasks, self.entropies.tolist(), self.entropy_fractions.tolist(), strict=True)
        return {
            "entropy": round(float(self.entropies.mean()), 4),
            "entropy_fraction": round(float(self.entropy_fractions.mean()), 4),
            "skill_use": [round(use, 4) for use in self.skill_use.mean((0, 1)).tolist()],
            "tasks": {
                task: {"entropy": round(entropy, 4), "entropy_fraction": round(fraction, 4)}
                for task, entropy, fraction in per_task
            },
        }

    @cached_property
    def cluster_order(self) -> list[int]:
        """The tasks in an order that puts similar ones side by side: the leaves of `order_by_clustering`."""
        return order_by_clustering(self.similarities)


def order_by_clustering(similarities: Tensor) -> list[int]:
    """The order of leaves under agglomerative clustering of similarities (T, T) with average linkage.

    Again and again the two most similar clusters are joined; the similarity of two clusters is the mean over pairs
    of their members. Clusters are joined at those ends whose members are more alike.
    Source: Sokal and Michener 1958, "A statistical method for evaluating systematic relationships" (UPGMA).
    """
    clusters = [[task] for task in range(len(similarities))]
    between = similarities.double().clone().fill_diagonal_(float("-inf"))
    sizes = torch.ones(len(clusters), dtype=torch.double)
    while sum(map(bool, clusters)) > 1:
        first, second = sorted(divmod(int(between.argmax()), len(clusters)))
        clusters[first] = _join(clusters[first], clusters[second], similarities)
        clusters[second] = []
        share = sizes[first] / (sizes[first] + sizes[second])
        mean = share * between[first] + (1 - share) * between[second]
        sizes[first] += sizes[second]
        between[first], between[:, first] = mean, mean
        between[second], between[:, second] = float("-inf"), float("-inf")
        between[first, first] = float("-inf")
    return next(cluster for cluster in clusters if cluster)


def _join(first: list[int], second: list[int], similarities: Tensor) -> list[int]:
    """Both, each as it is or turned round, so that the tasks that meet are the most similar."""
    ways = [(a, b) for a in (first, first[::-1]) for b in (second, second[::-1])]
    best = max(ways, key=lambda way: float(similarities[way[0][-1], way[1][0]]))
    return best[0] + best[1]
