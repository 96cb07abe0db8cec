"""Batches without HTTP, in a process of its own: our engine, PEFT Poly's generate, transformers continuous batching.

A line of JSON on standard input is a batch, `{"prompts", "tasks", "new_tokens"}`; the answer is a line, `{"seconds"}`.
Tasks are those of a data directory, by number, and null is the bare backbone; transformers serves that alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from common import peft_poly

from adapters_store.store import Store
from server.adapters.cache import AdapterCache
from server.adapters.injection import inject, linear_sizes
from server.backbone import Backbone, load_backbone
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.request import EngineRequest, SamplingParams
from server.engine.runner import Runner
from server.tasks import TaskCatalog
from serving.data import routings, task_id

Batch = tuple[list[list[int]], list[int | None], int]
Answer = Callable[[list[list[int]], list[int | None], int], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("engine", "peft-poly", "transformers"), required=True)
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--inventory", required=True)
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints belongs among the messages
    with Store.open(options.data_dir) as store:
        backbone = load_backbone(options.backbone, options.data_dir)
        catalog = TaskCatalog(store, AdapterCache(2**40), backbone, linear_sizes(backbone.model))
        make = {"engine": make_engine, "peft-poly": make_poly, "transformers": make_transformers}[options.kind]
        run = make(backbone, catalog, options)
        for line in sys.stdin:
            work = json.loads(line)
            start_s = time.perf_counter()
            run(work["prompts"], work["tasks"], work["new_tokens"])
            print(json.dumps({"seconds": time.perf_counter() - start_s}), file=answers, flush=True)


def make_engine(backbone: Backbone, catalog: TaskCatalog, options: argparse.Namespace) -> Answer:
    """The engine as the server configures it; adapters are assembled in the first batch that has them."""
    longest = min(EngineConfig.max_context, backbone.context_length)
    config = EngineConfig(max_context=longest, quantization=options.quantization)
    engine = Engine(Runner(backbone.model, inject(backbone.model), config), config, frozenset())
    engine.prepare_thread()

    def run(prompts: Sequence[Sequence[int]], tasks: Sequence[int | None], new_tokens: int) -> None:
        sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
        for row, (prompt, task) in enumerate(zip(prompts, tasks, strict=True)):
            name = "base" if task is None else task_id(task)
            engine.add(EngineRequest(str(row), name, tuple(prompt), sampling, catalog.resolve(name).handle))
        while engine.has_work:
            engine.step()

    return run


def make_poly(backbone: Backbone, catalog: TaskCatalog, options: argparse.Namespace) -> Answer:
    """PEFT Poly with the routings of the first 32 tasks, one static batch."""
    inventory = catalog.inventory(catalog.pick_inventory(options.inventory).digest)
    named = {task_id(number): logits for number, logits in enumerate(routings(inventory, 32))}
    model = peft_poly(backbone.model, replace(inventory, routings=named))

    def run(prompts: list[list[int]], tasks: list[int | None], new_tokens: int) -> None:
        ids = torch.tensor(prompts)
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            task_ids=torch.tensor(tasks),
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            eos_token_id=[],
            pad_token_id=0,
        )

    return run


def make_transformers(backbone: Backbone, catalog: TaskCatalog, options: argparse.Namespace) -> Answer:
    """transformers' continuous batching, without adapters."""
    from transformers import GenerationConfig

    def run(prompts: list[list[int]], tasks: list[int | None], new_tokens: int) -> None:
        config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        found = backbone.model.generate_batch(inputs=prompts, generation_config=config)  # type: ignore[operator]
        lengths = {len(output.generated_tokens) for output in found.values()}
        if lengths != {new_tokens}:
            raise SystemExit(f"transformers generated {lengths} tokens in place of {new_tokens}")

    return run


if __name__ == "__main__":
    main()
