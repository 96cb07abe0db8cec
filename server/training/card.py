"""The card of an inventory: what it is, what it learnt from, and how well."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from server.adapters.inventory import Inventory


def write_card(path: Path, inventory: Inventory, losses: Sequence[float]) -> None:
    """Write the card as Markdown; `losses` are the run's training losses, step by step."""
    path.write_text("\n".join([*_shape(inventory), *_run(inventory, losses), *_tasks(inventory), ""]))


def _shape(inventory: Inventory) -> list[str]:
    linears, heads, skills = inventory.routing_shape
    return [
        f"# Inventory for {inventory.backbone_name}",
        "",
        "| | |",
        "|---|---|",
        f"| backbone fingerprint | `{inventory.backbone_fingerprint}` |",
        f"| skills K, heads h, rank r, alpha | {skills}, {heads}, {inventory.rank}, {inventory.alpha:g} |",
        f"| adapted linears | {linears} |",
        f"| prompt format | `{inventory.prompt_format}` |",
        f"| training tasks | {len(inventory.routings)} |",
        "",
    ]


def _run(inventory: Inventory, losses: Sequence[float]) -> list[str]:
    training = inventory.training
    steps = training["steps"]
    command = (
        f"mhr pretrain --data DATA --out OUT --steps {steps} --batch-size {training['batch_size']}"
        f" --skills {inventory.num_skills} --heads {inventory.num_heads} --rank {inventory.rank}"
        f" --alpha {inventory.alpha:g} --adapter-lr {training['adapter_lr']:g}"
        f" --routing-lr {training['routing_lr']:g} --seed {training['seed']}"
        f"{' --noise' if training['noise'] else ''}"
    )
    before, after = training["validation_before"], training["validation_after"]
    window = max(1, len(losses) // 10)
    return [
        "## Training",
        "",
        f"    {command}",
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
