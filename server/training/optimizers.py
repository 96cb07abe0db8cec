"""The optimizers a trainer steps with, and their state as tensors."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Adafactor


class OptimizerName(StrEnum):
    """Which rule moves the parameters."""

    ADAMW = "adamw"
    ADAFACTOR = "adafactor"


def make_optimizer(name: OptimizerName, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """An optimizer over parameter groups, whose learning rates the trainer sets before every step.

    Adafactor takes them as they are (no relative step, no scaling by the parameter's size, updates clipped
    at 1), as in the paper's T0 runs. Both update on the device without waiting for it.
    """
    if name is OptimizerName.ADAFACTOR:
        return Adafactor(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
            groups, lr=0.0, clip_threshold=1.0, relative_step=False, scale_parameter=False
        )
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)


def state_tensors(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What the optimizer keeps about a parameter, by name; numbers as tensors of one element."""
    state = optimizer.state.get(parameter, {})
    return {key: value if isinstance(value, Tensor) else torch.tensor(value) for key, value in state.items()}


def load_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `state_tensors` gave, on the parameter's device."""
    state: dict[str, Any] = {key: tensor.to(parameter.device) for key, tensor in tensors.items()}
    if isinstance(optimizer, Adafactor) and state:
        state["step"] = int(state["step"])  # a plain number there, a tensor in AdamW
    optimizer.state[parameter] = state
