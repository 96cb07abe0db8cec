"""The card of an inventory: what it is, what it learnt from, and how well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from server.adapters.inventory import Inventory

_METHODS = {
    "mhr": "MHR: skills shared by all tasks, routed by several heads",
    "poly": "Poly: skills shared by all tasks, routed by one head",
    "shared": "shared LoRA: one skill for all tasks",
    "private": "private LoRAs: one skill for every task; their mean is AdapterSoup",
}
_OPTIONS = (
    "steps",
    "method",
    "skills",
    "heads",
    "spread",
    "rank",
    "alpha",
    "batch_size",
    "accumulate",
    "optimizer",
    "adapter_lr",
    "routing_lr",
    "task_sampling",
    "temperature",
    "rows_per_task",
    "seed",
)


def card(inventory: Inventory, losses: Sequence[float]) -> str:
    """The card as Markdown; `losses` are the run's training losses, step by step."""
    return "\n".join([*_shape(inventory), *_run(inventory, losses), *_tasks(inventory), ""])


def _shape(inventory: Inventory) -> list[str]:
    linears, heads, skills = inventory.routing_shape
    return [
        f"# Inventory for {inventory.backbone_name}",
        "",
        "| | |",
        "|---|---|",
        f"| method | {_METHODS[inventory.training['method']]} |",
        f"| backbone fingerprint | `{inventory.backbone_fingerprint}` |",
        f"| skills K, heads h, rank r, alpha | {skills}, {heads}, {inventory.rank}, {inventory.alpha:g} |",
        f"| adapted linears | {linears} |",
        f"| prompt format | `{inventory.prompt_format}` |",
        f"| training tasks | {len(inventory.routings)} |",
        "",
    ]


def _run(inventory: Inventory, losses: Sequence[float]) -> list[str]:
    training = inventory.training
    before, after = training["validation_before"], training["validation_after"]
    window = max(1, len(losses) // 10)
    return [
        "## Training",
        "",
        f"    {_command(training)}",
        "",
        "Losses are nats per answer token, each sequence counting alike.",
        "",
        "| | loss |",
        "|---|---|",
        f"| training, first {window} steps | {mean(losses[:window]):.3f} |",
        f"| training, last {window} steps | {mean(losses[-window:]):.3f} |",
        f"| held-out part of the training tasks, bare backbone | {mean(before.values()):.3f} |",
        f"| the same, each task with its own routing | {mean(after.values()):.3f} |",
        "",
    ]


def _command(training: Mapping[str, Any]) -> str:
    """The command line that trains such an inventory."""
    options = [
        f"--{name.replace('_', '-')} {_shown(training[name])}" for name in _OPTIONS if training[name] is not None
    ]
    return " ".join(["mhr pretrain --data DATA --out OUT", *options, *(["--noise"] if training["noise"] else [])])


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _tasks(inventory: Inventory) -> list[str]:
    before, after = inventory.training["validation_before"], inventory.training["validation_after"]
    rows = [
        f"| {name} | {about.source} | {about.licence} | {before[name]:.2f} | {after[name]:.2f} |"
        for name, about in inventory.tasks.items()
    ]
    return [
        "## Training tasks and their licences",
        "",
        "Held-out loss of the bare backbone, and with the task's routing.",
        "",
        "| task | source | licence | before | after |",
        "|---|---|---|---|---|",
        *rows,
    ]
