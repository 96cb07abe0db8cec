"""What 8-bit weights cost in quality: mean negative log-likelihood of real prompts and answers, fp32 beside int8.

Both read the same instances of the tasks in a folder of Super-NaturalInstructions, rendered as in serving; once with
the bare backbone and once with the bundled inventory's mean adapter. `answers` counts the answers' tokens alone.
"""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir

import torch
import torch.nn.functional as F
from common import conditions, print_json, print_table
from torch import Tensor

from server.adapters.adapted_linear import AdapterContext
from server.adapters.assembly import Adapter, mean_adapter
from server.adapters.injection import inject, linear_sizes
from server.adapters.inventory import Inventory
from server.adapters.slot_mix import Segment
from server.adapters.slots import AdapterSlots
from server.backbone import BUNDLED_BACKBONE, Backbone, load_backbone
from server.engine.config import EngineConfig, Quantization
from server.engine.runner import Runner
from server.inventories import BUNDLED_FOLDER
from server.training.examples import read_tasks
from server.training.prompts import encode_answer, encode_prompt, render_prompt

# The types in which the engine keeps adapters, with its compiled operators.
_TABLES: dict[Quantization, torch.dtype] = {"none": torch.float32, "int8": torch.float16}


@dataclass(frozen=True)
class Text:
    """A rendered prompt and its answer, as tokens."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Likelihood:
    """Mean negative log-likelihoods in nats, and the likeliest token at every place."""

    all: float
    answers: float
    likeliest: Tensor


def main() -> None:
    options = parse_options()
    if options.data is None:
        print("skipped: name a folder of Super-NaturalInstructions' tasks with --data")
        return
    about = conditions()
    inventory = Inventory.from_bytes((BUNDLED_FOLDER / "smollm2-135m-mhr.safetensors").read_bytes())
    measured: dict[tuple[str, Quantization], Likelihood] = {}
    num_tokens = 0
    for quantization in ("none", "int8"):
        backbone = load_backbone(BUNDLED_BACKBONE, options.cache_dir)
        texts = read_texts(backbone, inventory.prompt_format, options)
        num_tokens = sum(len(text.prompt) + len(text.answer) for text in texts)
        context = inject(backbone.model)
        Runner(backbone.model, context, EngineConfig(max_batch=1, quantization=quantization, merged_tasks=0))
        for name, adapter in (("none", None), ("mean", mean_adapter(inventory))):
            measured[name, quantization] = measure(backbone, context, adapter, _TABLES[quantization], texts)
    results = {adapter: compare(measured[adapter, "none"], measured[adapter, "int8"]) for adapter in ("none", "mean")}
    print_table(
        f"{options.per_task} instances of each task in {options.data}, {num_tokens} tokens",
        ("adapter", *next(iter(results.values()))),
        [(adapter, *values.values()) for adapter, values in results.items()],
    )
    print_json({"benchmark": "quality_int8", "conditions": about, "tokens": num_tokens, "results": results})


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=default_data(), help="folder with task files")
    parser.add_argument("--per-task", type=int, default=25, help="instances of each task")
    parser.add_argument("--cache-dir", type=Path, default=Path(gettempdir()) / "mhr-benchmarks")
    return parser.parse_args()


def default_data() -> Path | None:
    folder = os.environ.get("MHR_TEST_DATA")
    return Path(folder) / "superni" / "test" if folder else None


def read_texts(backbone: Backbone, prompt_format: str, options: argparse.Namespace) -> list[Text]:
    return [
        Text(
            tuple(encode_prompt(backbone.tokenizer, render_prompt(prompt_format, task.instruction, example.input))),
            tuple(encode_answer(backbone.tokenizer, example.outputs[0])),
        )
        for task in read_tasks(options.data)
        for example in task.examples[: options.per_task]
    ]


@torch.inference_mode()
def measure(
    backbone: Backbone, context: AdapterContext, adapter: Adapter | None, tables: torch.dtype, texts: list[Text]
) -> Likelihood:
    """Of the model as it is now, with the adapter on top, in tables of the given type."""
    slots = AdapterSlots(linear_sizes(backbone.model), num_slots=1, dtype=tables)
    slot = None if adapter is None else slots.acquire("", adapter)
    every: list[Tensor] = []
    answers: list[Tensor] = []
    likeliest: list[Tensor] = []
    for text in texts:
        tokens = torch.tensor([text.prompt + text.answer])
        mix = None if slot is None else slots.mix([], [Segment(slot, 0, tokens.shape[1])])
        with context.use(mix):
            logits = backbone.model(input_ids=tokens, use_cache=False).logits[0, :-1]
        losses = F.cross_entropy(logits, tokens[0, 1:], reduction="none")
        every.append(losses)
        answers.append(losses[len(text.prompt) - 1 :])
        likeliest.append(logits.argmax(-1))
    return Likelihood(torch.cat(every).mean().item(), torch.cat(answers).mean().item(), torch.cat(likeliest))


def compare(full: Likelihood, int8: Likelihood) -> dict[str, float]:
    return {
        "fp32, all": full.all,
        "int8, all": int8.all,
        "perplexity ratio": math.exp(int8.all - full.all),
        "fp32, answers": full.answers,
        "int8, answers": int8.answers,
        "answers' perplexity ratio": math.exp(int8.answers - full.answers),
        "same likeliest token": (full.likeliest == int8.likeliest).float().mean().item(),
    }


if __name__ == "__main__":
    main()
