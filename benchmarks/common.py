"""What the benchmarks share: timing in turns, conditions, a random inventory, and the printed result."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PolyConfig, get_peft_model
from transformers import PreTrainedModel

from server.adapters.assembly import assemble
from server.adapters.injection import linear_sizes
from server.adapters.inventory import Inventory, check_heads
from server.backbone import Backbone
from server.engine.request import AdapterHandle

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated runs of one thing."""

    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median."""
        return (max(self.runs) - min(self.runs)) / self.median


def time_in_turns(contenders: Mapping[str, Callable[[], object]], *, warmup: int, repeats: int) -> dict[str, Timing]:
    """Run the contenders one after another, `repeats` rounds, so that a drift of the machine meets all alike."""
    runs: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(warmup + repeats):
        for name, run in contenders.items():
            start_s = time.perf_counter()
            run()
            seconds = time.perf_counter() - start_s
            print(f"round {round_number + 1 - warmup}: {name} {seconds:.2f} s", file=sys.stderr)
            if round_number >= warmup:
                runs[name].append(seconds)
    return {name: Timing(tuple(seconds)) for name, seconds in runs.items()}


def conditions() -> dict[str, Any]:
    """When, on what and with which versions."""
    import peft
    import transformers

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def random_inventory(backbone: Backbone, *, tasks: int, skills: int, heads: int, rank: int, alpha: float) -> Inventory:
    """An inventory of small random skills over all linears, in bf16 as from a file, and `tasks` random routings named
    task-0, task-1 …
    """
    random = torch.Generator().manual_seed(0)
    sizes = linear_sizes(backbone.model)
    for linear, (d_in, d_out) in sizes.items():
        check_heads(linear, d_in, d_out, heads)
    A = {n: torch.randn(heads, skills, i // heads, rank, generator=random) / i**0.5 for n, (i, _) in sizes.items()}
    B = {n: 0.05 * torch.randn(heads, skills, rank, o // heads, generator=random) for n, (_, o) in sizes.items()}
    return Inventory(
        A={n: numbers.bfloat16() for n, numbers in A.items()},
        B={n: numbers.bfloat16() for n, numbers in B.items()},
        alpha=alpha,
        backbone_fingerprint=backbone.fingerprint,
        backbone_name=backbone.name,
        prompt_format="",
        routings={f"task-{n}": 3 * torch.randn(len(sizes), heads, skills, generator=random) for n in range(tasks)},
    )


def adapters_of(inventory: Inventory) -> list[AdapterHandle]:
    """Every routing's assembled adapter."""
    return [AdapterHandle(task, assemble(inventory, logits)) for task, logits in inventory.routings.items()]


def peft_poly(model: PreTrainedModel, inventory: Inventory) -> PeftModel:
    """The same inventory and routings as a PEFT Poly model (alpha must be 1); wraps `model`, in evaluation mode."""
    config = PolyConfig(
        task_type="CAUSAL_LM",
        r=inventory.rank,
        n_tasks=len(inventory.routings),
        n_skills=inventory.num_skills,
        n_splits=inventory.num_heads,
        target_modules=list(inventory.linears),
    )
    poly = get_peft_model(model, config).eval()
    parameters = dict(poly.named_parameters())
    routing = torch.stack(list(inventory.routings.values()))  # (T, L, h, K)
    with torch.no_grad():
        for row, linear in enumerate(inventory.linears):
            prefix = f"base_model.model.{linear}"
            parameters[f"{prefix}.poly_lora_A.default"].copy_(inventory.A[linear])
            parameters[f"{prefix}.poly_lora_B.default"].copy_(inventory.B[linear])
            parameters[f"{prefix}.poly_router.default.module_logits"].copy_(routing[:, row].flatten(1))
    return poly


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A Markdown table."""
    print(f"\n{title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(f'{cell:.4g}' if isinstance(cell, float) else str(cell) for cell in row)} |")


def print_json(document: Mapping[str, Any]) -> None:
    """The result as the last line."""
    print(f"\n{json.dumps(document)}", flush=True)
