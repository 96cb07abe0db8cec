"""Decoding speed of the engine with a batch of different tasks, beside PEFT Poly's `generate` on the same batch.

All contenders get the same prompts and generate the same number of greedy tokens, the end token ignored:
  engine           our engine, every sequence its own task (path slots)
  engine bare      our engine, no adapters
  engine one task  our engine, all sequences of one task, unmerged (path one-task)
  engine merged    the same with its adapter merged into a copy of the weights
  peft poly        PEFT Poly's generate(task_ids=…) with the same inventory and routings, a static batch
  transformers     the backbone's own generate, a static batch, no adapters
`--path` and `--quantization` choose among the engine's; with 8-bit weights nothing is merged.
Decoding is timed from every sequence's first token on: for the engine by its steps, for a `generate` as the
time of N tokens less that of one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import gettempdir

import torch
from common import (
    Timing,
    adapters_of,
    conditions,
    peft_poly,
    print_json,
    print_table,
    random_inventory,
    time_in_turns,
)

from server.adapters.injection import inject
from server.adapters.inventory import Inventory
from server.backbone import BUNDLED_BACKBONE, load_backbone
from server.engine.config import AdapterPath, EngineConfig, Quantization
from server.engine.engine import Engine
from server.engine.request import AdapterHandle, EngineRequest, SamplingParams, TokenOutput
from server.engine.runner import Runner


def main() -> None:
    options = parse_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    about = conditions()
    loaded = load_backbone(options.backbone, options.cache_dir)
    inventory = random_inventory(
        loaded, tasks=options.tasks, skills=options.skills, heads=options.heads, rank=options.rank, alpha=1.0
    )
    random = torch.Generator().manual_seed(1)
    prompts = torch.randint(5, loaded.model.config.vocab_size, (options.tasks, options.prompt_tokens), generator=random)
    engines = engine_runs(options, prompts, adapters_of(inventory))
    peers = peer_runs(options, prompts, inventory)
    contenders: dict[str, Callable[[], object]] = {name: run.run for name, run in engines.items()}
    for name, peer in peers.items():
        contenders[name] = partial(peer.run, options.new_tokens)
        contenders[f"{name}, one token"] = partial(peer.run, 1)
    timings = time_in_turns(contenders, warmup=options.warmup, repeats=options.repeats)

    decode_s = {name: Timing(tuple(run.decode_s[-options.repeats :])).median for name, run in engines.items()}
    for name in peers:
        decode_s[name] = timings[name].median - timings[f"{name}, one token"].median
    results = {
        name: {
            "total_s": timings[name].median,
            "spread": timings[name].spread,
            "total_tokens_per_s": options.tasks * options.new_tokens / timings[name].median,
            "decode_tokens_per_s": options.tasks * (options.new_tokens - 1) / seconds,
        }
        for name, seconds in decode_s.items()
    }
    print_table(
        f"{options.tasks} tasks at once, {options.prompt_tokens} tokens in, {options.new_tokens} out, "
        f"r = {options.rank}, K = {options.skills}, h = {options.heads}, {about['threads']} threads",
        ("contender", "total s", "spread", "tok/s in all", "decode tok/s"),
        [(name, *values.values()) for name, values in results.items()],
    )
    setting = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    document = {"benchmark": "engine_offline", "conditions": about, "options": setting, "results": results}
    if "engine" in engines and "peft poly" in peers:
        # The last run of each is a full one only for the engine; PEFT's tokens are generated once more to compare.
        same = torch.equal(engines["engine"].tokens(), peers["peft poly"].run(options.new_tokens))
        ratio = results["engine"]["decode_tokens_per_s"] / results["peft poly"]["decode_tokens_per_s"]
        print(f"\nengine decodes {ratio:.2f} times as fast as PEFT Poly; same greedy tokens: {'yes' if same else 'no'}")
        document |= {"decode_speed_over_peft_poly": ratio, "same_tokens_as_peft_poly": same}
    print_json(document)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default=BUNDLED_BACKBONE, help="bundled name, directory or Hugging Face id")
    parser.add_argument("--cache-dir", type=Path, default=Path(gettempdir()) / "mhr-benchmarks")
    parser.add_argument("--tasks", type=int, default=16, help="sequences, each of its own task")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--skills", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--threads", type=int, help="torch's threads; its own choice by default")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quantization", nargs="+", default=["none"], choices=["none", "int8"])
    parser.add_argument("--path", nargs="+", default=["slots", "bare"], choices=["slots", "bare", "one-task", "merged"])
    parser.add_argument("--no-operators", action="store_true", help="without the compiled operators")
    parser.add_argument("--no-poly", dest="poly", action="store_false", help="leave PEFT Poly out")
    parser.add_argument("--no-transformers", dest="transformers", action="store_false", help="leave transformers out")
    return parser.parse_args()


def engine_runs(
    options: argparse.Namespace, prompts: torch.Tensor, adapters: list[AdapterHandle]
) -> dict[str, EngineRun]:
    """The asked paths in the asked quantizations; every engine has a model of its own."""
    runs: dict[str, EngineRun] = {}
    one_task = [adapters[0]] * len(adapters)
    for quantization in options.quantization:
        suffix = "" if quantization == "none" else f", {quantization}"
        engine = make_engine(options, quantization, "slots")
        kinds: dict[str, tuple[str, list[AdapterHandle] | None]] = {
            "slots": ("engine", adapters),
            "bare": ("engine bare", None),
            "one-task": ("engine one task", one_task),
        }
        for path, (name, given) in kinds.items():
            if path in options.path:
                runs[name + suffix] = EngineRun(engine, prompts, options.new_tokens, given)
        if "merged" in options.path and quantization == "none":
            merging = make_engine(options, quantization, "merged")
            runs["engine merged"] = EngineRun(merging, prompts, options.new_tokens, one_task)
    return runs


def peer_runs(options: argparse.Namespace, prompts: torch.Tensor, inventory: Inventory) -> dict[str, GenerateRun]:
    runs: dict[str, GenerateRun] = {}
    if options.poly:
        model = peft_poly(load_backbone(options.backbone, options.cache_dir).model, inventory)
        runs["peft poly"] = GenerateRun(model, prompts, {"task_ids": torch.arange(options.tasks)})
    if options.transformers:
        runs["transformers"] = GenerateRun(load_backbone(options.backbone, options.cache_dir).model, prompts, {})
    return runs


def make_engine(options: argparse.Namespace, quantization: Quantization, adapter_path: AdapterPath) -> Engine:
    model = load_backbone(options.backbone, options.cache_dir).model
    config = EngineConfig(
        max_batch=options.tasks,
        max_context=options.prompt_tokens + options.new_tokens,
        prefix_cache_bytes=0,  # every round has the same prompts
        quantization=quantization,
        adapter_path=adapter_path,
        operators=not options.no_operators,
    )
    return Engine(Runner(model, inject(model), config), config, frozenset())


@dataclass
class EngineRun:
    """Runs of the engine over one batch of prompts (N, T), with adapters or without."""

    engine: Engine
    prompts: torch.Tensor
    new_tokens: int
    adapters: list[AdapterHandle] | None
    decode_s: list[float] = field(default_factory=list)  # of every run
    generated: dict[str, list[int]] = field(default_factory=dict)  # of the last run

    def run(self) -> None:
        sampling = SamplingParams(max_new_tokens=self.new_tokens, ignore_eos=True)
        self.generated = {str(row): [] for row in range(len(self.prompts))}
        for row, prompt in enumerate(self.prompts.tolist()):
            adapter = None if self.adapters is None else self.adapters[row]
            self.engine.add(EngineRequest(str(row), str(row), tuple(prompt), sampling, adapter))
        decode_start_s, decode_start_tokens = None, 0
        while self.engine.has_work:
            for output in self.engine.step()[0]:
                if isinstance(output, TokenOutput):
                    self.generated[output.request_id].append(output.token_id)
            if decode_start_s is None and all(self.generated.values()):
                decode_start_s = time.perf_counter()
                decode_start_tokens = self._count()
        assert decode_start_s is not None
        seconds = time.perf_counter() - decode_start_s
        # Chunked prefill lets early sequences decode before the last one's first token: scale to a whole decode.
        whole = len(self.prompts) * (self.new_tokens - 1)
        self.decode_s.append(seconds * whole / (self._count() - decode_start_tokens))

    def tokens(self) -> torch.Tensor:
        """The last run's new tokens (N, new_tokens)."""
        return torch.tensor(list(self.generated.values()))

    def _count(self) -> int:
        return sum(map(len, self.generated.values()))


@dataclass(frozen=True)
class GenerateRun:
    """Runs of a model's own `generate` over one static batch of prompts (N, T)."""

    model: torch.nn.Module
    prompts: torch.Tensor
    options: dict[str, torch.Tensor]

    @torch.inference_mode()
    def run(self, new_tokens: int) -> torch.Tensor:
        out: torch.Tensor = self.model.generate(
            input_ids=self.prompts,
            attention_mask=torch.ones_like(self.prompts),
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            eos_token_id=[],
            pad_token_id=0,
            **self.options,
        )
        return out[:, self.prompts.shape[1] :]


if __name__ == "__main__":
    main()
