"""The one trainer: a frozen backbone, a learner, and steps over batches, with a state that can be saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from server.adapters.adapted_linear import AdapterContext
from server.errors import InvalidInput
from server.training.attention import PackedAttention
from server.training.batches import Batch
from server.training.checkpoint import Checkpoint, describe_differences
from server.training.distributed import ALONE, Processes
from server.training.lanes import Lanes
from server.training.learners import Learner
from server.training.loss import answer_accuracies, answer_logits, answer_losses
from server.training.optimizers import OptimizerName, load_state, make_optimizer, state_tensors
from server.training.validation import Validation


@dataclass(frozen=True)
class TrainerConfig:
    """How a learner moves. Learning rates rise over the warm-up and then fall linearly to zero."""

    steps: int
    optimizer: OptimizerName = OptimizerName.ADAMW
    adapter_lr: float = 1e-3
    routing_lr: float = 0.1
    warmup: float = 0.06  # fraction of the steps
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    noise: bool = False  # draw routing weights from a relaxed Bernoulli in training
    seed: int = 0


class StepLoss(NamedTuple):
    """In nats per answer token, before the step, on the device."""

    mean: Tensor  # () over the sequences of the step, of all processes
    of_sequences: Tensor  # (B,) of this process, in the order of its batches


class Trainer:
    """Steps on a learner's parameters through a frozen model whose linears are wrapped.

    With several processes every one of them steps, each on its share of the batches, and all of them keep
    the same parameters.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        context: AdapterContext,
        learner: Learner,
        config: TrainerConfig,
        processes: Processes = ALONE,
    ) -> None:
        self.model = model
        self.context = context
        self.learner = learner
        self.config = config
        self.step_count = 0
        self.device = next(model.parameters()).device
        self.lanes = Lanes(self.device)
        self._processes = processes
        self._attention = PackedAttention(model)
        self._optimizer = make_optimizer(config.optimizer, _groups(learner, config))

    def step(self, *batches: Batch, at_rest: int = 0) -> StepLoss:
        """One step on batches as if they were one, and as if so many sequences more had a loss of zero.

        A CPU computes batches side by side, on as many lanes as it has; a GPU one after the other, so that a step may
        hold more sequences than memory does. Reading the loss waits for the device, and nothing else here does.
        """
        self._set_learning_rates()
        sequences = sum(batch.num_sequences for batch in batches) + at_rest
        parameters = list(self._trainable().values())
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)  # not None, which would hold them still when all rest
        losses = [torch.empty(0, device=self.device)]
        for of_batch, gradients in self.lanes.map(
            partial(self._gradients, parameters, sequences), list(enumerate(batches))
        ):
            losses.append(of_batch)
            _add_gradients(parameters, gradients)
        of_sequences = torch.cat(losses)
        mean = self._processes.average_gradients(parameters, of_sequences.sum() / max(1, sequences), weight=sequences)
        nn.utils.clip_grad_norm_(parameters, self.config.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step_count += 1
        return StepLoss(mean, of_sequences)

    def _gradients(
        self, parameters: Sequence[nn.Parameter], sequences: int, place_and_batch: tuple[int, Batch]
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """A batch's losses, and the gradients of its part in the mean over so many sequences."""
        place, batch = place_and_batch
        losses = self.losses(batch, self._noise(place))
        return losses.detach(), torch.autograd.grad(losses.sum() / sequences, parameters, allow_unused=True)

    def losses(self, batch: Batch, noise: torch.Generator | None = None) -> Tensor:
        """(B,) negative log-likelihood of each sequence's answer, in nats per token."""
        batch = batch.to(self.device)
        return answer_losses(self._logits(batch, self.learner, noise), batch)

    @torch.inference_mode()
    def validate(self, batches: Iterable[Batch], learner: Learner | None = None) -> list[Validation]:
        """Of each sequence of held-out batches, in their own order; of another learner where one is given."""
        of_batches = []
        for host_batch in batches:
            batch = host_batch.to(self.device)
            logits = self._logits(batch, learner or self.learner, None)
            of_batches.append(torch.stack((answer_accuracies(logits, batch), answer_losses(logits, batch)), dim=1))
        return [Validation(accuracy, loss) for accuracy, loss in torch.cat(of_batches).tolist()]

    def _logits(self, batch: Batch, learner: Learner, noise: torch.Generator | None) -> Tensor:
        adapters = learner.adapters(batch.tasks, self.model.dtype, noise)
        return answer_logits(self.model, self.context, self._attention, adapters, batch)

    def _noise(self, place: int) -> torch.Generator | None:
        """The noise of a step's batch, or None.

        Seeded by the step and the batch's place in it, so that a resumed run draws what the uninterrupted one
        would have drawn, and no two batches or processes draw the same.
        """
        if not self.config.noise:
            return None
        piece = self._processes.rank + place * self._processes.world_size
        # Kept within 32 bits for the usual seeds: a CPU's generator reads no more of them.
        seed = self.config.seed * 1_000_003 + self.step_count + piece * 15_485_863
        return torch.Generator(self.device).manual_seed(seed)

    def _set_learning_rates(self) -> None:
        factor = _schedule(self.step_count, self.config)
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor

    def copy_parameters(self) -> dict[str, Tensor]:
        """A copy of what is learnt, as it stands."""
        return {name: parameter.detach().clone() for name, parameter in self._trainable().items()}

    @torch.no_grad()
    def load_parameters(self, values: Mapping[str, Tensor]) -> None:
        """Put a copy back."""
        for name, parameter in self._trainable().items():
            parameter.copy_(values[name])

    def to_bytes(self, notes: Mapping[str, Any] | None = None, kept: Mapping[str, Tensor] | None = None) -> bytes:
        """Parameters, optimizer state and step as one safetensors document, with a caller's notes and tensors."""
        tensors = {f"kept.{name}": tensor for name, tensor in (kept or {}).items()}
        for name, parameter in self._trainable().items():
            tensors[f"parameter.{name}"] = parameter.detach()
            for key, value in state_tensors(self._optimizer, parameter).items():
                tensors[f"optimizer.{name}.{key}"] = value
        return Checkpoint(self.step_count, asdict(self.config), notes or {}, tensors).to_bytes()

    def load(self, checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Continue from what `to_bytes` made; returns the caller's notes and tensors.

        Raises InvalidInput, with nothing changed, when it was made with another configuration or of other parameters.
        """
        if differences := describe_differences(checkpoint.config, asdict(self.config)):
            raise InvalidInput(
                f"the checkpoint was made with other settings ({differences}); resume with those, or begin anew"
            )
        parameters = _below("parameter.", checkpoint.tensors)
        if differences := describe_differences(_shapes(parameters), _shapes(self._trainable())):
            raise InvalidInput(f"the checkpoint is of other parameters ({differences}); begin anew")
        self.load_parameters(parameters)
        for name, parameter in self._trainable().items():
            load_state(self._optimizer, parameter, _below(f"optimizer.{name}.", checkpoint.tensors))
        self.step_count = checkpoint.step
        return dict(checkpoint.notes), _below("kept.", checkpoint.tensors)

    def _trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.learner.named_parameters() if p.requires_grad}


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _add_gradients(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            assert parameter.grad is not None
            parameter.grad += gradient


def _groups(learner: Learner, config: TrainerConfig) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = []
    if adapters := learner.adapter_parameters():
        groups.append({"params": adapters, "peak_lr": config.adapter_lr, "weight_decay": config.weight_decay})
    if routing := learner.routing_parameters():
        groups.append({"params": routing, "peak_lr": config.routing_lr, "weight_decay": 0.0})
    return groups


def _schedule(step: int, config: TrainerConfig) -> float:
    """The learning rates' factor at a step: linear warm-up, then linear decay to zero."""
    warmup = max(1, round(config.steps * config.warmup))
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (config.steps - step) / max(1, config.steps - warmup))
