"""Several processes, one training run: each computes its share of a step, and all take the same step.

DistributedDataParallel wraps a module whose forward pass holds the parameters. Here the trained parameters
(a few million numbers) are outside of the frozen model that uses them, so one explicit all-reduce of their
gradients is simpler, and there is nothing worth overlapping it with.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from server.errors import InvalidInput


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether it is this one that writes files and shows progress."""
        return self.rank == 0

    def average_gradients(self, parameters: Sequence[nn.Parameter], loss: Tensor, weight: float) -> Tensor:
        """Replace the gradients by their mean over the processes, each counting by its weight; returns the mean loss.

        A process that had nothing to compute takes part with weight 0.
        """
        if self.world_size == 1:
            return loss
        gradients = [p.grad.flatten() for p in parameters if p.grad is not None]
        flat = torch.cat([*gradients, loss.reshape(1), loss.new_ones(1)]) * weight
        dist.all_reduce(flat)
        flat /= flat[-1].clone()
        parts = torch.split(flat[:-2], [p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        return flat[-2]

    def add_up(self, values: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values


ALONE = Processes()


@contextmanager
def joined_processes(device: str) -> Iterator[tuple[Processes, str]]:
    """The processes that torchrun started this one among, and this one's device; alone without torchrun.

    On CUDA each process of a machine takes the GPU of its local rank. Raises InvalidInput when there are
    fewer GPUs than processes.
    """
    if not dist.is_torchelastic_launched():
        yield ALONE, device
        return
    backend = "gloo"
    if device.startswith("cuda"):
        local_rank, available = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= available:
            raise InvalidInput(
                f"process {local_rank} of this machine has no GPU of its own, there are {available}; "
                f"start torchrun with --nproc-per-node {available} or fewer"
            )
        backend, device = "nccl", f"cuda:{local_rank}"
        torch.cuda.set_device(local_rank)
    dist.init_process_group(backend)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size()), device
    finally:
        dist.destroy_process_group()
