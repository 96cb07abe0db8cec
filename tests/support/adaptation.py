"""Adaptations to test with: a context that remembers, a task's specification, and what is served before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from server.adapters.assembly import Adapter, assemble
from server.adapters.inventory import Inventory
from server.backbone import Backbone
from server.training.adapt import AdaptResult, AdaptSpec, Served, adapt, split_examples
from server.training.examples import Example
from server.training.methods import Hyperparameters, Method
from server.training.validation import Validation


class Recorder:
    """A job context that remembers, and stops at a given step."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.checkpoint: bytes | None = None
        self._stop_at = stop_at

    def should_stop(self) -> bool:
        return self._stop_at is not None and len(self.losses) >= self._stop_at

    def report(self, event: str, data: dict[str, Any]) -> None:
        self.events.append((event, data))

    def save(self, checkpoint: bytes) -> None:
        self.checkpoint = checkpoint

    @property
    def losses(self) -> list[float]:
        return [data["loss"] for event, data in self.events if event == "step"]

    @property
    def at_rest(self) -> list[int]:
        return [data["at_rest"] for event, data in self.events if event == "step"]


def make_spec(examples: list[Example], method: str = "mhr", **settings: Any) -> AdaptSpec:
    """A short adaptation that holds a quarter of the examples out."""
    settings = {"steps": 15, "evaluate_every": 5, "adapter_lr": 1e-2, **settings}
    train, validation = split_examples(examples, None, 0.25, seed=0)
    return AdaptSpec(
        Method(method), "Say it.", train, validation, "definition-input-output", Hyperparameters(**settings)
    )


def serve(adapter: Adapter | None, instruction: str = "Say it.") -> Served:
    """An adapter, or the bare backbone, as what answered for the task before."""
    return Served(adapter, instruction, "definition-input-output")


def measure(spec: AdaptSpec, backbone: Backbone, served: Served | None) -> Validation:
    """How good what is served is on the held-out examples."""
    once = replace(spec, method=Method.LORA, hyperparameters=Hyperparameters(steps=1))
    before = adapt(once, backbone, None, served, Recorder()).before
    assert before is not None
    return before


def learnt_adapter(result: AdaptResult, inventory: Inventory) -> Adapter:
    """What serves the task from now on."""
    if result.adapter is not None:
        return result.adapter
    assert result.routing is not None
    return assemble(inventory, result.routing)
