"""What 8-bit weights cost in quality, fp32 beside int8: mean negative log-likelihood of real prompts and answers, and
ROUGE-L of the answers that the engine gives greedily.

Both read the same instances of the tasks in a folder of Super-NaturalInstructions, rendered as in serving; once with
the bare backbone and once with the bundled inventory's mean adapter. `answers` counts the answers' tokens alone.
"""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
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
from server.engine.engine import Engine
from server.engine.request import AdapterHandle, EngineRequest, SamplingParams, TokenOutput
from server.engine.runner import Runner
from server.inventories import BUNDLED_FOLDER
from server.training.examples import read_tasks
from server.training.prompts import encode_answer, encode_prompt, find_prompt_format, render_prompt
from server.training.rouge import rouge_l

# The types in which the engine keeps adapters, with its compiled operators.
_TABLES: dict[Quantization, torch.dtype] = {"none": torch.float32, "int8": torch.float16}
_NEW_TOKENS = 32


@dataclass(frozen=True)
class Text:
    """A rendered prompt and its answer, as tokens; and all answers that are right."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Likelihood:
    """Mean negative log-likelihoods in nats, and the likeliest token at every place."""

    all: float
    answers: float
    likeliest: Tensor


@dataclass(frozen=True)
class Measured:
    """Of one adapter under one number format; ROUGE-L in percent."""

    likelihood: Likelihood
    rouge_l: float


def main() -> None:
    options = parse_options()
    if options.data is None:
        print("skipped: name a folder of Super-NaturalInstructions' tasks with --data")
        return
    about = conditions()
    inventory = Inventory.from_bytes((BUNDLED_FOLDER / "smollm2-135m-mhr.safetensors").read_bytes())
    measured: dict[tuple[str, Quantization], Measured] = {}
    num_tokens = 0
    for quantization in ("none", "int8"):
        backbone = load_backbone(BUNDLED_BACKBONE, options.cache_dir)
        texts = read_texts(backbone, inventory.prompt_format, options)
        num_tokens = sum(len(text.prompt) + len(text.answer) for text in texts)
        context = inject(backbone.model)
        config = EngineConfig(quantization=quantization, merged_tasks=0)
        engine = Engine(Runner(backbone.model, context, config), config, backbone.eos_token_ids)
        for name, adapter in (("none", None), ("mean", mean_adapter(inventory))):
            likelihood = measure(backbone, context, adapter, _TABLES[quantization], texts)
            end_mark = find_prompt_format(inventory.prompt_format).next_pair
            answers = [answer.partition(end_mark)[0] for answer in generate(backbone, engine, adapter, texts)]
            scores = [100 * rouge_l(answer, text.outputs) for answer, text in zip(answers, texts, strict=True)]
            measured[name, quantization] = Measured(likelihood, mean(scores))
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
            tuple(example.outputs),
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


def generate(backbone: Backbone, engine: Engine, adapter: Adapter | None, texts: list[Text]) -> list[str]:
    """The engine's greedy answers."""
    handle = None if adapter is None else AdapterHandle("mean", adapter)
    sampling = SamplingParams(max_new_tokens=_NEW_TOKENS)
    for number, text in enumerate(texts):
        engine.add(EngineRequest(str(number), "t", text.prompt, sampling, handle))
    tokens: dict[str, list[int]] = {str(number): [] for number in range(len(texts))}
    while engine.has_work:
        for output in engine.step()[0]:
            if isinstance(output, TokenOutput):
                tokens[output.request_id].append(output.token_id)
    return [backbone.tokenizer.decode(own, skip_special_tokens=True) for own in tokens.values()]


def compare(full_scores: Measured, int8_scores: Measured) -> dict[str, float]:
    full, int8 = full_scores.likelihood, int8_scores.likelihood
    return {
        "fp32, all": full.all,
        "int8, all": int8.all,
        "perplexity ratio": math.exp(int8.all - full.all),
        "fp32, answers": full.answers,
        "int8, answers": int8.answers,
        "answers' perplexity ratio": math.exp(int8.answers - full.answers),
        "same likeliest token": (full.likeliest == int8.likeliest).float().mean().item(),
        "fp32, ROUGE-L": full_scores.rouge_l,
        "int8, ROUGE-L": int8_scores.rouge_l,
    }


if __name__ == "__main__":
    main()
