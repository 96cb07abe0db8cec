"""What the prefix cache and small prefill chunks do for a busy engine, and what they cost.

Two engines on the same backbone and adapters: `default`, and `plain`, which keeps no prefixes and always computes as
many prompt tokens a step as it may. Every request has a task's adapter, every prompt an input never seen before.
  rounds      every task asks once a round, all at once: instruction tokens computed again after the first round
  first token one request alone, of a task seen before: time to its first token
  long prompt streams decode, and a long prompt of another task arrives: p95 time between their tokens, against before
  burst       every task asks once, all at once, with instructions never seen before: tokens per second in all
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from common import adapters_of, conditions, print_json, print_table, random_inventory

from server.adapters.injection import inject
from server.backbone import BUNDLED_BACKBONE, load_backbone
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.request import AdapterHandle, EngineRequest, SamplingParams, TokenOutput
from server.engine.runner import Runner

PLAIN = {"prefix_cache_bytes": 0, "busy_prefill_chunk": None}


def main() -> None:
    options = parse_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    about = conditions()
    contenders = {"default": make_contender(options, {}), "plain": make_contender(options, PLAIN)}
    results: dict[str, dict[str, Any]] = {
        name: {"rounds": contender.rounds(options.rounds)} for name, contender in contenders.items()
    }
    print_rounds(results, options)
    for scenario in ("first_token", "long_prompt", "burst"):
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
        for _, (name, contender) in itertools.product(range(options.repeats), contenders.items()):
            runs[name].append(getattr(contender, scenario)())
        for name, figures in runs.items():
            results[name][scenario] = {key: spread_of([run[key] for run in figures]) for key in figures[0]}
        print_scenario(scenario, results)
    setting = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    print_json({"benchmark": "prefix", "conditions": about, "options": setting, "results": results})


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default=BUNDLED_BACKBONE, help="bundled name, directory or Hugging Face id")
    parser.add_argument("--cache-dir", type=Path, default=Path(gettempdir()) / "mhr-benchmarks")
    parser.add_argument("--tasks", type=int, default=32)
    parser.add_argument("--instruction-tokens", type=int, default=150)
    parser.add_argument("--input-tokens", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=64, help="of the burst")
    parser.add_argument("--long-tokens", type=int, default=1500)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--skills", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--threads", type=int, help="torch's threads; its own choice by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def make_contender(options: argparse.Namespace, settings: dict[str, Any]) -> Contender:
    backbone = load_backbone(options.backbone, options.cache_dir)
    inventory = random_inventory(
        backbone, tasks=options.tasks, skills=options.skills, heads=options.heads, rank=options.rank, alpha=1.0
    )
    prompt_tokens = max(options.long_tokens, options.instruction_tokens + options.input_tokens)
    config = EngineConfig(
        max_batch=max(options.tasks, options.streams + 1),
        max_context=min(prompt_tokens + 2 * options.new_tokens, backbone.context_length),
        threads=options.threads,
        **settings,
    )
    engine = Engine(Runner(backbone.model, inject(backbone.model), config), config, frozenset())
    contender = Contender(engine, adapters_of(inventory), options, backbone.model.config.vocab_size)
    contender.instructions = [contender.tokens(options.instruction_tokens) for _ in range(options.tasks)]
    return contender


@dataclass
class Contender:
    """One engine and the scenarios it is put through; every call sees prompts of its own."""

    engine: Engine
    adapters: list[AdapterHandle]
    options: argparse.Namespace
    vocabulary: int
    instructions: list[tuple[int, ...]] = field(default_factory=list)  # of the tasks
    random: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(1))
    ids: itertools.count[int] = field(default_factory=itertools.count)

    def tokens(self, count: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, self.vocabulary, (count,), generator=self.random).tolist())

    def rounds(self, count: int) -> list[int]:
        """Instruction tokens computed in each round."""
        private = self.options.tasks * self.options.input_tokens
        computed = []
        for _ in range(count):
            for task, instruction in enumerate(self.instructions):
                self._add(task, instruction + self.tokens(self.options.input_tokens), new_tokens=1)
            computed.append(self._drain() - private)
        return computed

    def first_token(self) -> dict[str, float]:
        prompt = self.instructions[0] + self.tokens(self.options.input_tokens)
        self._add(0, prompt, new_tokens=1)
        start_s = time.perf_counter()
        self._drain()
        return {"seconds": time.perf_counter() - start_s}

    def long_prompt(self) -> dict[str, float]:
        """The streams decode alone for about as many steps as the long prompt then takes."""
        streams = [
            self._add(n, self.tokens(self.options.input_tokens), self.options.long_tokens)
            for n in range(self.options.streams)
        ]
        decoding = 0
        while decoding < len(streams):
            stats = self.engine.step()[1]
            decoding = stats.decode_rows if stats else 0
        before = self._gaps(streams, steps=self.options.long_tokens // 32)
        arrival_s = time.perf_counter()
        long = self._add(self.options.streams, self.tokens(self.options.long_tokens), new_tokens=1)
        during = self._gaps(streams, steps=self.options.long_tokens, until=long)
        first_token_s = time.perf_counter() - arrival_s
        self.engine.abort_all()
        return {
            "p95_before_s": percentile_95(before),
            "p95_during_s": percentile_95(during),
            "ratio": percentile_95(during) / percentile_95(before),
            "long_prompt_first_token_s": first_token_s,
        }

    def burst(self) -> dict[str, float]:
        prompt_tokens = self.options.instruction_tokens // 2
        for task in range(self.options.tasks):
            self._add(task, self.tokens(prompt_tokens), self.options.new_tokens)
        start_s = time.perf_counter()
        self._drain()
        return {"tokens_per_s": self.options.tasks * self.options.new_tokens / (time.perf_counter() - start_s)}

    def _add(self, task: int, prompt: tuple[int, ...], new_tokens: int) -> str:
        request_id = str(next(self.ids))
        sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
        adapter = self.adapters[task % len(self.adapters)]
        self.engine.add(EngineRequest(request_id, str(task), prompt, sampling, adapter))
        return request_id

    def _drain(self) -> int:
        """Step until nothing is left; the prompt tokens that were computed."""
        computed = 0
        while self.engine.has_work:
            stats = self.engine.step()[1]
            computed += stats.prefill_tokens if stats else 0
        return computed

    def _gaps(self, streams: Sequence[str], steps: int, until: str | None = None) -> list[float]:
        """Seconds between the streams' tokens, over some steps or until another request has a token."""
        last_s = dict.fromkeys(streams, time.perf_counter())
        gaps = []
        for _ in range(steps):
            outputs = [o for o in self.engine.step()[0] if isinstance(o, TokenOutput)]
            now_s = time.perf_counter()
            for output in outputs:
                if output.request_id in last_s:
                    gaps.append(now_s - last_s[output.request_id])
                    last_s[output.request_id] = now_s
            if any(output.request_id == until for output in outputs):
                break
        return gaps


def percentile_95(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=20, method="inclusive")[-1]


def spread_of(values: Sequence[float]) -> dict[str, float]:
    """Median, and (largest - smallest) / median."""
    median = statistics.median(values)
    return {"median": median, "spread": (max(values) - min(values)) / median}


def print_rounds(results: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    whole = options.tasks * options.instruction_tokens
    for result in results.values():
        result["computed_again"] = [tokens / whole for tokens in result["rounds"][1:]]
    print_table(
        f"{options.tasks} tasks, instructions of {options.instruction_tokens} tokens, inputs of {options.input_tokens}",
        ("engine", *(f"instruction tokens computed, round {n + 1}" for n in range(options.rounds))),
        [(name, *result["rounds"]) for name, result in results.items()],
    )


def print_scenario(scenario: str, results: dict[str, dict[str, Any]]) -> None:
    columns = list(results["default"][scenario])
    rows = [
        (name, *(figure for key in columns for figure in result[scenario][key].values()))
        for name, result in results.items()
    ]
    print_table(scenario, ("engine", *(head for key in columns for head in (key, "spread"))), rows)


if __name__ == "__main__":
    main()
