"""The one trainer: a frozen backbone, a learner, and steps over batches, with a state that can be saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from server.adapters.adapted_linear import AdapterContext, TaskRows
from server.adapters.documents import read_document, write_document
from server.errors import InvalidInput
from server.training.attention import training_attention
from server.training.batches import Batch
from server.training.learners import Learner

_FORMAT = "mhr-checkpoint-1"
_OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainerConfig:
    """How a learner moves. Learning rates rise over the warm-up and then fall linearly to zero."""

    steps: int
    adapter_lr: float = 1e-3
    routing_lr: float = 0.1
    warmup: float = 0.06  # fraction of the steps
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    noise: bool = False  # draw routing weights from a relaxed Bernoulli in training
    seed: int = 0


class Trainer:
    """Steps of AdamW on a learner's parameters through a frozen model whose linears are wrapped."""

    def __init__(
        self, model: PreTrainedModel, context: AdapterContext, learner: Learner, config: TrainerConfig
    ) -> None:
        self.model = model
        self.context = context
        self.learner = learner
        self.config = config
        self.step_count = 0
        self._device = next(model.parameters()).device
        self._switch = training_attention(model)
        self._optimizer = torch.optim.AdamW(_groups(learner, config), betas=(0.9, 0.999), fused=True)

    def step(self, batch: Batch) -> float:
        """One step; returns the batch's loss, in nats per answer token, as it was before the step."""
        self._set_learning_rates()
        noise = self._noise() if self.config.noise else None
        loss = self.loss(batch, noise)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([p for g in self._optimizer.param_groups for p in g["params"]], self.config.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step_count += 1
        return loss.item()

    def loss(self, batch: Batch, noise: torch.Generator | None = None, learner: Learner | None = None) -> Tensor:
        """Mean negative log-likelihood of the answers: over a sequence's tokens, then over sequences."""
        batch = batch.to(self._device)
        adapters = (learner or self.learner).adapters(batch.tasks, self.model.dtype, noise)
        with self.context.use(TaskRows(adapters, batch.rows)), self._attention():
            hidden: Tensor = self.model.base_model(input_ids=batch.tokens, use_cache=False)[0]  # (B, T, d)
        # Logits only where the loss reads them: over all positions they would cost more than the layers do.
        answers = hidden.flatten(0, 1)[batch.positions]  # (P, d)
        head = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        losses = nn.functional.cross_entropy(head(answers).float(), batch.targets, reduction="none")
        return (losses * batch.weights).sum()

    @torch.inference_mode()
    def evaluate(self, batches: Iterable[Batch], learner: Learner | None = None) -> float:
        """Mean loss over batches, each sequence counting alike; of another learner where one is given."""
        total, sequences = 0.0, 0
        for batch in batches:
            size = batch.num_sequences
            total += self.loss(batch, learner=learner).item() * size
            sequences += size
        return total / sequences

    def _attention(self) -> AbstractContextManager[None]:
        return nullcontext() if self._switch is None else self._switch.engaged()

    def _noise(self) -> torch.Generator:
        # Seeded by the step, so that a resumed run draws what the uninterrupted one would have drawn.
        return torch.Generator(self._device).manual_seed(self.config.seed * 1_000_003 + self.step_count)

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
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        document = {
            "step": self.step_count,
            "config": asdict(self.config),
            "notes": dict(notes or {}),
        }
        return write_document(_FORMAT, document, tensors)

    def load_bytes(self, data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Continue from `to_bytes`; returns the caller's notes and tensors.

        Raises InvalidInput when it was made with another configuration.
        """
        document, tensors = read_document(_FORMAT, data)
        if document["config"] != asdict(self.config):
            raise InvalidInput("the checkpoint was made with other settings; resume with those, or begin anew")
        self.load_parameters({name: tensors[f"parameter.{name}"] for name in self._trainable()})
        for name, parameter in self._trainable().items():
            keys = [key for key in _OPTIMIZER_STATE if f"optimizer.{key}.{name}" in tensors]
            if keys:
                self._optimizer.state[parameter] = {
                    # Adam's step count stays where torch's fused kernel keeps it: beside the parameter.
                    key: tensors[f"optimizer.{key}.{name}"].to(parameter.device)
                    for key in keys
                }
        self.step_count = document["step"]
        return document["notes"], {n.removeprefix("kept."): t for n, t in tensors.items() if n.startswith("kept.")}

    def _trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.learner.named_parameters() if p.requires_grad}


def _groups(learner: Learner, config: TrainerConfig) -> list[dict[str, object]]:
    groups: list[dict[str, object]] = []
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
