"""The methods of few-shot adaptation, and what can be set of them."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from server.errors import InvalidInput


class Method(StrEnum):
    """What is learnt of a new task (the table of variants in docs/notation.md)."""

    MHR = "mhr"
    MHR_Z = "mhr-z"
    MHR_MU = "mhr-mu"
    POLY = "poly"
    POLY_Z = "poly-z"
    POLY_MU = "poly-mu"
    LORA = "lora"

    @property
    def needs_inventory(self) -> bool:
        return self is not Method.LORA

    @property
    def routing_alone(self) -> bool:
        return self in (Method.MHR_Z, Method.POLY_Z)

    @property
    def learns_routing(self) -> bool:
        return self.routing_alone or self in (Method.MHR, Method.POLY)

    @property
    def tunes_mean(self) -> bool:
        return self in (Method.MHR_MU, Method.POLY_MU)

    def check_heads(self, inventory: str, num_heads: int) -> None:
        """Raise InvalidInput when the method is for another number of heads than the inventory's."""
        if self.value.startswith("poly") and num_heads > 1:
            other = self.value.replace("poly", "mhr")
            raise InvalidInput(
                f"{self.value!r} needs an inventory with h = 1, and {inventory!r} has h = {num_heads}; use {other!r}",
                param="method",
            )
        if self.value.startswith("mhr") and num_heads == 1:
            other = self.value.replace("mhr", "poly")
            raise InvalidInput(
                f"{self.value!r} needs an inventory with h > 1, and {inventory!r} has h = 1; use {other!r}",
                param="method",
            )


# Learning rates; docs/tuning.md has the comparisons. A fresh LoRA begins with B = 0 and small numbers in A. Where both
# are trained, steps of one size change what they compute several times as much.
_FRESH_LR = 1.5e-3
_TRAINED_LR = 5e-4
# Routing that is all there is to learn has far to go; beside others that learn it loses what it began with.
_ROUTING_ALONE_LR = 0.15
_ROUTING_LR = 0.003


class Hyperparameters(BaseModel):
    """How a task is learnt; what is left out takes the method's default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(default=60, ge=1, le=10_000, description="most steps; early stopping may end sooner")
    batch_size: int = Field(default=8, ge=1, le=256, description="examples a step")
    adapter_lr: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="peak learning rate of adapters; 0.0015 for a fresh LoRA, 0.0005 for what begins trained",
    )
    routing_lr: float | None = Field(
        default=None,
        gt=0,
        le=10,
        description="peak learning rate of routing logits; 0.15 where nothing else is learnt, else 0.003",
    )
    warmup: float = Field(default=0.06, ge=0, le=1, description="fraction of the steps that the learning rate rises")
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    clip_norm: float = Field(default=1.0, gt=0, description="largest norm of the gradient")
    noise: bool = Field(default=False, description="draw routing weights from a relaxed Bernoulli in training")
    evaluate_every: int = Field(default=10, ge=1, description="steps between validations")
    patience: int = Field(default=3, ge=1, description="validations below the best that end the job")
    refit: float = Field(
        default=0.5, ge=0, le=1, description="share of the steps, the last ones, that learn from the held-out part too"
    )
    rest: int = Field(
        default=10, ge=0, description="steps that an example known by heart sits out, at most those of three epochs"
    )
    rank: int = Field(
        default=4,
        ge=0,
        le=256,
        description="rank of the LoRA that `lora` learns, and `mhr` and `poly` beside the skills; "
        "0 for none there, and the skills learn",
    )
    alpha: float = Field(default=16.0, gt=0, description="alpha of that LoRA; its scale is alpha / rank")

    def check(self, method: Method) -> None:
        """Raise InvalidInput when the method cannot learn with them."""
        if method is Method.LORA and self.rank == 0:
            raise InvalidInput("a 'lora' needs a rank of at least 1", param="hyperparameters.rank")

    def resolved(self, method: Method) -> Hyperparameters:
        """With the method's defaults in the place of what was left out."""
        defaults = {
            "adapter_lr": _TRAINED_LR if method.tunes_mean or self.rank == 0 else _FRESH_LR,
            "routing_lr": _ROUTING_ALONE_LR if method.routing_alone else _ROUTING_LR,
        }
        return self.model_copy(update={k: v for k, v in defaults.items() if getattr(self, k) is None})

    def idle_in(self, method: Method) -> frozenset[str]:
        """The names of those that make no difference to the method."""
        idle: set[str] = set()
        if method.tunes_mean or method.routing_alone:
            idle |= {"rank", "alpha"}
        if self.rank == 0:
            idle |= {"alpha"}
        if method.routing_alone:
            idle |= {"adapter_lr", "weight_decay"}
        if not method.learns_routing:
            idle |= {"routing_lr", "noise"}
        return frozenset(idle)

    def used_by(self, method: Method) -> dict[str, Any]:
        """Those that make a difference to the method, as JSON."""
        return self.model_dump(mode="json", exclude=set(self.idle_in(method)))
