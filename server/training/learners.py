"""What a method learns: routing with skills, alone or with an adapter beside; or one adapter. All give a batch's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from server.adapters.assembly import Adapter, LowRank, mean_adapter, mix, side_by_side
from server.adapters.inventory import Inventory, ShapeGroup
from server.adapters.routing import fresh_routing, routing_weights, sample_routing_weights

StackedAdapters = dict[str, tuple[Tensor, Tensor]]


class Learner(nn.Module):
    """The trainable side of a model. Subclasses say which parameters move and how a batch's adapters are made."""

    def adapters(self, tasks: Tensor, dtype: torch.dtype, noise: torch.Generator | None = None) -> StackedAdapters:
        """{linear: A (N, d_in, r), B (N, r, d_out)} of tasks (N,), scaling folded into B; N may be 1 for all."""
        raise NotImplementedError

    def adapter_parameters(self) -> list[nn.Parameter]:
        """Parameters that learn with the adapters' learning rate."""
        raise NotImplementedError

    def routing_parameters(self) -> list[nn.Parameter]:
        """Parameters that learn with the routing's learning rate."""
        return []


class RoutedLearner(Learner):
    """Skills shared by T tasks, and each task's routing (T, L, h, K), learnt as well or given and fixed."""

    def __init__(
        self, inventory: Inventory, routing: Tensor, *, train_skills: bool, train_routing: bool = True
    ) -> None:
        super().__init__()
        self._groups = inventory.groups
        self._alpha = inventory.alpha
        self._rank = inventory.rank
        self._linears = inventory.linears
        self.A = _parameters([group.A for group in self._groups], train_skills)
        self.B = _parameters([group.B for group in self._groups], train_skills)
        self.routing = nn.Parameter(routing.clone().float(), requires_grad=train_routing)

    def adapters(self, tasks: Tensor, dtype: torch.dtype, noise: torch.Generator | None = None) -> StackedAdapters:
        logits = self.routing[tasks]  # (N, L, h, K)
        weights = routing_weights(logits) if noise is None else sample_routing_weights(logits, noise)
        stacked: StackedAdapters = {}
        for group, A, B in zip(self._groups, self.A, self.B, strict=True):
            mixed_A, mixed_B = mix(A, B, weights[:, list(group.rows)])
            stacked |= _unstack(group.linears, mixed_A, mixed_B * (self._alpha / self._rank), dtype)
        return stacked

    def adapter_parameters(self) -> list[nn.Parameter]:
        return [p for p in [*self.A, *self.B] if p.requires_grad]

    def routing_parameters(self) -> list[nn.Parameter]:
        return [self.routing] if self.routing.requires_grad else []

    def skills(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The learnt skills by linear, in the inventory's order: A (h, K, d_in/h, r) and B (h, K, r, d_out/h)."""
        A = _by_linear(self._groups, self.A)
        B = _by_linear(self._groups, self.B)
        return {n: A[n] for n in self._linears}, {n: B[n] for n in self._linears}

    @torch.no_grad()
    def adapter(self, task: int) -> Adapter:
        """The adapter of one task as it stands, fp32."""
        weights = routing_weights(self.routing[task : task + 1])
        assembled: dict[str, LowRank] = {}
        for group, A, B in zip(self._groups, self.A, self.B, strict=True):
            mixed_A, mixed_B = mix(A, B, weights[:, list(group.rows)])
            assembled |= {n: LowRank(mixed_A[0, i], mixed_B[0, i]) for i, n in enumerate(group.linears)}
        return Adapter({n: assembled[n] for n in self._linears}, alpha=self._alpha, rank=self._rank)


class PlainLearner(Learner):
    """One adapter for every row: LoRA from scratch, a shared LoRA, or the mean of an inventory, tuned."""

    def __init__(self, start: Adapter) -> None:
        super().__init__()
        self._alpha = start.alpha
        self._rank = start.rank
        self._linears = tuple(start.weights)
        self._shapes = _group_by_shape(start)
        self.A = _parameters([torch.stack([start.weights[n].A for n in names]) for names in self._shapes], True)
        self.B = _parameters([torch.stack([start.weights[n].B for n in names]) for names in self._shapes], True)

    def adapters(self, tasks: Tensor, dtype: torch.dtype, noise: torch.Generator | None = None) -> StackedAdapters:
        stacked: StackedAdapters = {}
        for names, A, B in zip(self._shapes, self.A, self.B, strict=True):
            stacked |= _unstack(names, A[None], B[None] * (self._alpha / self._rank), dtype)
        return stacked

    def adapter_parameters(self) -> list[nn.Parameter]:
        return [*self.A, *self.B]

    @torch.no_grad()
    def adapter(self) -> Adapter:
        """The adapter as it stands, fp32."""
        pairs = {
            name: LowRank(A[i].clone(), B[i].clone())
            for names, A, B in zip(self._shapes, self.A, self.B, strict=True)
            for i, name in enumerate(names)
        }
        return Adapter({n: pairs[n] for n in self._linears}, alpha=self._alpha, rank=self._rank)


class AugmentedLearner(Learner):
    """A mixture of fixed skills, whose routing moves, and a plain adapter beside it for what no mixture can do."""

    def __init__(self, mixture: RoutedLearner, beside: PlainLearner) -> None:
        super().__init__()
        self.mixture = mixture
        self.beside = beside

    def adapters(self, tasks: Tensor, dtype: torch.dtype, noise: torch.Generator | None = None) -> StackedAdapters:
        mixed = self.mixture.adapters(tasks, dtype, noise)
        plain = self.beside.adapters(tasks, dtype)
        return {linear: _stack_ranks(mixed[linear], plain[linear]) for linear in mixed}

    def adapter_parameters(self) -> list[nn.Parameter]:
        return self.beside.adapter_parameters()

    def routing_parameters(self) -> list[nn.Parameter]:
        return self.mixture.routing_parameters()

    def adapter(self) -> Adapter:
        """Both as one adapter, as they stand, fp32."""
        return side_by_side(self.mixture.adapter(0), self.beside.adapter())


class FixedLearner(Learner):
    """Learns nothing: a given adapter, or the bare backbone, to be compared with."""

    def __init__(self, adapter: Adapter | None) -> None:
        super().__init__()
        self._adapter = adapter

    def adapters(self, tasks: Tensor, dtype: torch.dtype, noise: torch.Generator | None = None) -> StackedAdapters:
        if self._adapter is None:
            return {}
        scaling = self._adapter.scaling
        return {
            linear: (pair.A[None].to(dtype), (pair.B[None] * scaling).to(dtype))
            for linear, pair in self._adapter.weights.items()
        }

    def adapter_parameters(self) -> list[nn.Parameter]:
        return []


def fresh_skills(
    sizes: Mapping[str, tuple[int, int]], num_heads: int, num_skills: int, rank: int, generator: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """New skills: A uniform within ±1/sqrt(3 d_in), B = 0, so that a fresh model is the bare backbone.

    Source of the bound: microsoft/mttl, tag mhr-camera-ready.
    """
    A: dict[str, Tensor] = {}
    B: dict[str, Tensor] = {}
    for linear, (d_in, d_out) in sizes.items():
        bound = (3 * d_in) ** -0.5
        shape = (num_heads, num_skills, d_in // num_heads, rank)
        A[linear] = (torch.rand(shape, generator=generator) * 2 - 1) * bound
        B[linear] = torch.zeros(num_heads, num_skills, rank, d_out // num_heads)
    return A, B


def fresh_adapter(sizes: Mapping[str, tuple[int, int]], rank: int, alpha: float, generator: torch.Generator) -> Adapter:
    """A LoRA to learn from scratch: one skill, one head."""
    A, B = fresh_skills(sizes, 1, 1, rank, generator)
    return Adapter({n: LowRank(A[n][0, 0], B[n][0, 0]) for n in sizes}, alpha=alpha, rank=rank)


def routing_learner(inventory: Inventory, generator: torch.Generator, *, train_skills: bool) -> RoutedLearner:
    """A learner of one new task whose routing starts near the mean."""
    routing = fresh_routing(*inventory.routing_shape, generator)
    return RoutedLearner(inventory, routing[None], train_skills=train_skills)


def mean_learner(inventory: Inventory) -> PlainLearner:
    """A learner of one new task that starts from the inventory's mean and drops the routing."""
    return PlainLearner(mean_adapter(inventory))


def _parameters(tensors: Sequence[Tensor], trainable: bool) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(t.clone().float(), requires_grad=trainable) for t in tensors])


def _unstack(linears: Sequence[str], A: Tensor, B: Tensor, dtype: torch.dtype) -> StackedAdapters:
    """A (N, G, d_in, r), B (N, G, r, d_out) by linear."""
    pairs = zip(A.to(dtype).unbind(1), B.to(dtype).unbind(1), strict=True)
    return dict(zip(linears, pairs, strict=True))


def _stack_ranks(mixed: tuple[Tensor, Tensor], plain: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One pair of the sum of both ranks, of A (N, d_in, r), B (N, r, d_out) and of a pair that all N share."""
    (A, B), (shared_A, shared_B) = mixed, plain
    return (
        torch.cat((A, shared_A.expand(A.shape[0], -1, -1)), dim=2),
        torch.cat((B, shared_B.expand(B.shape[0], -1, -1)), dim=1),
    )


def _by_linear(groups: Sequence[ShapeGroup], stacked: nn.ParameterList) -> dict[str, Tensor]:
    return {
        linear: tensor[place].detach().clone()
        for group, tensor in zip(groups, stacked, strict=True)
        for place, linear in enumerate(group.linears)
    }


def _group_by_shape(adapter: Adapter) -> list[tuple[str, ...]]:
    by_shape: dict[tuple[torch.Size, torch.Size], list[str]] = {}
    for linear, pair in adapter.weights.items():
        by_shape.setdefault((pair.A.shape, pair.B.shape), []).append(linear)
    return [tuple(names) for names in by_shape.values()]
