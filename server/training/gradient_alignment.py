"""Do tasks pull the shared skills the same way? The paper explains multi-task gains by this alignment."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from server.training.batches import Batch
from server.training.trainer import Trainer


def gradient_alignment(trainer: Trainer, batches: Sequence[Batch]) -> float:
    """Mean over task pairs of the cosine between the tasks' loss gradients, one batch a task; -1 to 1.

    Gradients are with respect to the inventory, the skills' A and B of all linears as one vector, without
    noise. A task whose gradient is zero has cosine 0 with every other. With unit gradients u of n tasks the
    mean is (|sum u|^2 - sum |u|^2) / (n (n - 1)), so that no more than two gradients are held at once.
    Source: Caccia et al. 2023 (arXiv 2211.03831), section 5, which shows the quantity and gives no formula.
    """
    if len(batches) < 2:
        raise ValueError("alignment is between tasks: at least two batches are needed")
    parameters = trainer.learner.adapter_parameters()
    total = [torch.zeros_like(parameter) for parameter in parameters]
    squares = torch.zeros((), dtype=torch.float64, device=total[0].device)
    for batch in batches:
        gradients = torch.autograd.grad(trainer.losses(batch).mean(), parameters)
        norm = _square(gradients).sqrt().clamp_min(1e-30)
        units = [gradient / norm.to(gradient.dtype) for gradient in gradients]
        squares += _square(units)
        for sum_, unit in zip(total, units, strict=True):
            sum_ += unit
    pairs = len(batches) * (len(batches) - 1)
    return ((_square(total) - squares) / pairs).item()


def choose_tasks(num_tasks: int, number: int, seed: int) -> list[int]:
    """The tasks that a run compares, the same at every resume: `number` of them, or all there are."""
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(num_tasks, generator=generator)[:number].tolist())


def _square(tensors: Sequence[Tensor]) -> Tensor:
    """The squared length of the tensors as one vector, fp64, on their device."""
    return torch.stack([torch.linalg.vector_norm(t, dtype=torch.float64) ** 2 for t in tensors]).sum()
