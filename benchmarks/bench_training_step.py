"""Seconds of one training step of skills and routing, ours beside PEFT Poly's, on the same batches.

Both train all skills and the routing of every task in the batch with the relaxed Bernoulli noise, AdamW, and
the same padded batches; a batch's sequences are of similar length, as our sampler makes them. PEFT's step is the
one its users write: labels into the model, its loss, backward, clip, optimizer step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from tempfile import gettempdir

import torch
from common import conditions, peft_poly, print_json, print_table, random_inventory, time_in_turns

from server.adapters.injection import inject
from server.adapters.inventory import Inventory
from server.backbone import BUNDLED_BACKBONE, load_backbone, training_dtype
from server.training.batches import Batch, EncodedExample, collate
from server.training.learners import RoutedLearner
from server.training.trainer import Trainer, TrainerConfig


def main() -> None:
    options = parse_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    about = conditions()
    dtype = training_dtype() if options.dtype is None else getattr(torch, options.dtype)
    ours = load_backbone(options.backbone, options.cache_dir, dtype=dtype)
    theirs = load_backbone(options.backbone, options.cache_dir, dtype=dtype)
    inventory = random_inventory(
        ours, tasks=options.tasks, skills=options.skills, heads=options.heads, rank=options.rank, alpha=1.0
    )
    batches = make_batches(options, ours.model.config.vocab_size)
    contenders = {
        "ours": our_step(ours.model, inventory, batches),
        "peft poly": peft_step(theirs.model, inventory, batches),
    }
    timings = time_in_turns(contenders, warmup=options.warmup, repeats=options.repeats)
    ratio = timings["peft poly"].median / timings["ours"].median
    tokens = sum(batch.tokens.numel() for batch in batches) / len(batches)
    print_table(
        f"{options.batch_size} sequences of {options.tasks} tasks padded to {min_width(batches)} to "
        f"{max_width(batches)} tokens, r = {options.rank}, K = {options.skills}, h = {options.heads}, "
        f"{dtype}, {about['threads']} threads",
        ("contender", "s a step", "spread", "padded tok/s"),
        [(name, timing.median, timing.spread, tokens / timing.median) for name, timing in timings.items()],
    )
    print(f"\nour step is {ratio:.2f} times as fast as PEFT Poly's")
    setting = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    print_json(
        {
            "benchmark": "training_step",
            "conditions": about,
            "options": setting,
            "dtype": str(dtype),
            "results": {n: {"step_s": t.median, "spread": t.spread} for n, t in timings.items()},
            "speed_over_peft_poly": ratio,
        }
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default=BUNDLED_BACKBONE, help="bundled name, directory or Hugging Face id")
    parser.add_argument("--cache-dir", type=Path, default=Path(gettempdir()) / "mhr-benchmarks")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of both models; by default what `mhr pretrain` takes here"
    )
    parser.add_argument("--tasks", type=int, default=40, help="training tasks, drawn at random for every sequence")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=3, help="different batches, taken in turns")
    parser.add_argument("--min-tokens", type=int, default=120, help="of a batch's longest sequence")
    parser.add_argument("--max-tokens", type=int, default=240, help="of a batch's longest sequence")
    parser.add_argument("--answer-tokens", type=int, default=12, help="of the longest answer")
    parser.add_argument("--skills", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--threads", type=int, help="torch's threads; its own choice by default")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=6)
    return parser.parse_args()


def make_batches(options: argparse.Namespace, vocabulary: int) -> list[Batch]:
    """Random tokens; batch i is padded to a width between the limits, its sequences at least 0.8 times as long."""
    random = torch.Generator().manual_seed(2)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=random))

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, vocabulary, (length,), generator=random).tolist())

    batches = []
    for number in range(options.batches):
        step = (options.max_tokens - options.min_tokens) / max(1, options.batches - 1)
        width = round(options.min_tokens + number * step)
        examples = []
        for row in range(options.batch_size):
            answer = draw(1, options.answer_tokens)
            length = width if row == 0 else draw(round(0.8 * width), width)
            examples.append(EncodedExample(draw(0, options.tasks - 1), tokens(length - answer), (tokens(answer),)))
        batches.append(collate(examples))
    return batches


def our_step(model: torch.nn.Module, inventory: Inventory, batches: list[Batch]) -> Callable[[], object]:
    learner = RoutedLearner(inventory, torch.stack(list(inventory.routings.values())), train_skills=True)
    trainer = Trainer(model, inject(model), learner, TrainerConfig(steps=10_000, noise=True))
    turns = cycle(batches)
    return lambda: trainer.step(next(turns))


def peft_step(model: torch.nn.Module, inventory: Inventory, batches: list[Batch]) -> Callable[[], object]:
    poly = peft_poly(model, inventory).train()
    trainable = [parameter for parameter in poly.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3, weight_decay=0.0)
    turns = cycle(batches)

    def step() -> None:
        batch = next(turns)
        labels = torch.full(batch.tokens.shape, -100)
        labels.view(-1)[batch.positions + 1] = batch.targets
        loss = poly(input_ids=batch.tokens, labels=labels, task_ids=batch.tasks[batch.rows], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def min_width(batches: list[Batch]) -> int:
    return min(batch.tokens.shape[1] for batch in batches)


def max_width(batches: list[Batch]) -> int:
    return max(batch.tokens.shape[1] for batch in batches)


if __name__ == "__main__":
    main()
