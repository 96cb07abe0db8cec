"""Seconds of one training step of skills and routing, ours beside PEFT Poly's, on the same sequences.

Both train all skills and the routing of every task in the batch with the relaxed Bernoulli noise and AdamW. With
--data the batches are those that `mhr pretrain` draws from the folder's tasks; without it they are random tokens of
similar length, of which no two begin alike. PEFT's step is the one its users write: the sequences padded on the right
to the longest, labels into the model, its loss, backward, clip, optimizer step; an attention mask, which would slow it
down, is left out, as padding on the right needs none. The peak of memory is the resident set of a process of its own,
which loads the backbone and takes one step on every batch.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import gettempdir

import torch
from common import Timing, conditions, peft_poly, print_json, print_table, random_inventory, time_in_turns

from server.adapters.injection import inject
from server.adapters.inventory import Inventory
from server.backbone import BUNDLED_BACKBONE, Backbone, load_backbone, training_dtype
from server.training.batches import Batch, EncodedExample, collate, encode_examples
from server.training.examples import read_tasks
from server.training.lanes import Lanes
from server.training.learners import RoutedLearner
from server.training.prompts import DEFAULT_PROMPT_FORMAT
from server.training.sampling import BatchSampler, SamplingConfig
from server.training.trainer import Trainer, TrainerConfig

OURS, PEFT = "ours", "peft poly"


@dataclass(frozen=True)
class Sequences:
    """The sequences of one step."""

    batch: Batch  # all of them
    pieces: Sequence[Batch]  # all of them, as our trainer takes them on this machine

    @property
    def computed_tokens(self) -> int:
        """What our trainer computes: an instruction once in every piece."""
        return sum(len(piece.tokens) for piece in self.pieces)


@dataclass(frozen=True)
class PaddedBatch:
    """The sequences of a packed batch, padded on the right."""

    tokens: torch.Tensor  # (B, T)
    labels: torch.Tensor  # (B, T), -100 where the loss does not look
    tasks: torch.Tensor  # (B,)


def main() -> None:
    options = parse_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    about = conditions()
    dtype = training_dtype() if options.dtype is None else getattr(torch, options.dtype)
    if options.peak_of:
        print_json(peak(options, dtype))
        return
    peaks = {name: measured_peak(name) for name in (OURS, PEFT)}
    backbone = load_backbone(options.backbone, options.cache_dir, dtype=dtype)
    batches, num_tasks = make_batches(options, backbone)
    steps = {name: make_steps(name, options, dtype, batches, num_tasks) for name in (OURS, PEFT)}
    timings = time_in_turns(
        {f"{name}, batch {i}": step for i in range(len(batches)) for name in steps for step in [steps[name][i]]},
        warmup=options.warmup,
        repeats=options.repeats,
    )
    by_name = {name: [timings[f"{name}, batch {i}"] for i in range(len(batches))] for name in steps}
    report(options, about, dtype, batches, num_tasks, by_name, peaks)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default=BUNDLED_BACKBONE, help="bundled name, directory or Hugging Face id")
    parser.add_argument("--cache-dir", type=Path, default=Path(gettempdir()) / "mhr-benchmarks")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of both models; by default what `mhr pretrain` takes here"
    )
    parser.add_argument("--data", type=Path, help="folder of task files to draw batches from, as `mhr pretrain --data`")
    parser.add_argument("--rows-per-task", type=int, default=1, help="with --data: as of `mhr pretrain`")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=3, help="different batches, taken in turns")
    parser.add_argument("--tasks", type=int, default=40, help="without --data: tasks, drawn for every sequence")
    parser.add_argument("--min-tokens", type=int, default=120, help="without --data: of a batch's longest sequence")
    parser.add_argument("--max-tokens", type=int, default=240, help="without --data: of a batch's longest sequence")
    parser.add_argument("--answer-tokens", type=int, default=12, help="without --data: of the longest answer")
    parser.add_argument("--skills", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--threads", type=int, help="torch's threads; its own choice by default")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="steps on every batch")
    parser.add_argument("--peak-of", choices=(OURS, PEFT), help="only one contender, and only its peak of memory")
    return parser.parse_args()


def make_batches(options: argparse.Namespace, backbone: Backbone) -> tuple[list[Sequences], int]:
    """The steps' sequences, and the number of tasks that they are drawn from."""
    piece_size = Lanes(backbone.device).piece_size(options.batch_size)
    if options.data is None:
        return random_batches(options, backbone.model.config.vocab_size, piece_size), options.tasks
    examples: list[EncodedExample] = []
    tasks = read_tasks(options.data)
    for index, task in enumerate(tasks):
        examples += encode_examples(
            backbone.tokenizer,
            task.examples,
            task=index,
            instruction=task.instruction,
            prompt_format=DEFAULT_PROMPT_FORMAT,
            context_length=backbone.context_length,
            place=task.task,
        )
    sampler = BatchSampler(examples, options.batch_size, 0, SamplingConfig(rows_per_task=options.rows_per_task))
    steps = zip(sampler.from_step(0), sampler.from_step(0, piece_size), strict=True)
    return [Sequences(batch, pieces) for (batch,), pieces in islice(steps, options.batches)], len(tasks)


def random_batches(options: argparse.Namespace, vocabulary: int, piece_size: int) -> list[Sequences]:
    """Random tokens; batch i is as wide as its place between the limits, its sequences at least 0.8 times as long."""
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
        pieces = [collate(examples[i : i + piece_size]) for i in range(0, len(examples), piece_size)]
        batches.append(Sequences(collate(examples), pieces))
    return batches


def pad(batch: Batch) -> PaddedBatch:
    """The same sequences with the same answers as PEFT's users collate them."""
    prefixes = {(s.prefix_start, s.prefix_stop) for s in batch.segments}
    sequences = [s for s in batch.segments if (s.start, s.stop) not in prefixes]
    width = max(segment.context for segment in sequences) + 1
    tokens = torch.zeros((len(sequences), width), dtype=torch.long)
    labels = torch.full_like(tokens, -100)
    for row, segment in enumerate(sequences):
        own = slice(segment.start, segment.stop)
        known = torch.cat((batch.tokens[segment.prefix_start : segment.prefix_stop], batch.tokens[own]))
        read = (batch.answers >= segment.start) & (batch.answers < segment.stop)
        answer = batch.targets[read]
        stop = len(known) + 1
        tokens[row, :stop] = torch.cat((known, answer[-1:]))
        labels[row, stop - len(answer) : stop] = answer
    ends = torch.tensor(batch.lengths).cumsum(0)
    starts = torch.tensor([segment.start for segment in sequences])
    return PaddedBatch(tokens, labels, batch.tasks[torch.searchsorted(ends, starts, right=True)])


def make_steps(
    name: str, options: argparse.Namespace, dtype: torch.dtype, batches: Sequence[Sequences], num_tasks: int
) -> list[Callable[[], object]]:
    """One step for each batch, all of one trainer with a model of its own."""
    backbone = load_backbone(options.backbone, options.cache_dir, dtype=dtype)
    inventory = random_inventory(
        backbone, tasks=num_tasks, skills=options.skills, heads=options.heads, rank=options.rank, alpha=1.0
    )
    return (our_steps if name == OURS else peft_steps)(backbone.model, inventory, batches)


def our_steps(model: torch.nn.Module, inventory: Inventory, batches: Sequence[Sequences]) -> list[Callable[[], object]]:
    learner = RoutedLearner(inventory, torch.stack(list(inventory.routings.values())), train_skills=True)
    trainer = Trainer(model, inject(model), learner, TrainerConfig(steps=10_000, noise=True))
    return [lambda pieces=sequences.pieces: trainer.step(*pieces) for sequences in batches]


def peft_steps(
    model: torch.nn.Module, inventory: Inventory, batches: Sequence[Sequences]
) -> list[Callable[[], object]]:
    poly = peft_poly(model, inventory).train()
    trainable = [parameter for parameter in poly.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3, weight_decay=0.0)

    def step(batch: PaddedBatch) -> None:
        loss = poly(input_ids=batch.tokens, labels=batch.labels, task_ids=batch.tasks, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    padded = [pad(sequences.batch) for sequences in batches]
    return [lambda batch=batch: step(batch) for batch in padded]


def peak(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, float]:
    """This process's largest resident set in MiB, before and after a step on every batch."""
    batches, num_tasks = make_batches(options, load_backbone(options.backbone, options.cache_dir, dtype=dtype))
    steps = make_steps(options.peak_of, options, dtype, batches, num_tasks)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for step in steps:
        step()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"loaded_mib": before / 1024, "peak_mib": after / 1024}


def measured_peak(name: str) -> dict[str, float]:
    """`peak` of one contender, in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], f"--peak-of={name}"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    measured: dict[str, float] = json.loads(output.splitlines()[-1])
    return measured


def report(
    options: argparse.Namespace,
    about: dict[str, object],
    dtype: torch.dtype,
    batches: Sequence[Sequences],
    num_tasks: int,
    timings: dict[str, list[Timing]],
    peaks: dict[str, dict[str, float]],
) -> None:
    """The table and the JSON document. The ratio is that of the time for all batches: of the throughput."""
    padded = [pad(sequences.batch).tokens.numel() for sequences in batches]
    computed = [sequences.computed_tokens for sequences in batches]
    rows = []
    for number, sequences in enumerate(batches):
        ours, theirs = timings[OURS][number].median, timings[PEFT][number].median
        tasks = len(sequences.batch.tasks)
        rows.append((number, tasks, padded[number], computed[number], ours, theirs, theirs / ours))
    ours, theirs = (sum(timing.median for timing in timings[name]) for name in (OURS, PEFT))
    rows.append(("all", "", sum(padded), sum(computed), ours, theirs, theirs / ours))
    print_table(
        f"{options.batch_size} sequences a step of {num_tasks} tasks {'' if options.data is None else 'of --data '}"
        f"(r = {options.rank}, K = {options.skills}, h = {options.heads}), {dtype}, {about['threads']} threads",
        ("batch", "its tasks", "padded tokens", "our tokens", "ours, s", "PEFT Poly, s", "ratio"),
        rows,
    )
    print(f"\nour throughput is {theirs / ours:.2f} times PEFT Poly's; peak memory ", end="")
    print(f"{peaks[OURS]['peak_mib']:.0f} MiB against {peaks[PEFT]['peak_mib']:.0f} MiB")
    setting = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    print_json(
        {
            "benchmark": "training_step",
            "conditions": about,
            "options": setting,
            "dtype": str(dtype),
            "padded_tokens": padded,
            "our_tokens": computed,
            "results": {
                name: {
                    "step_s": [timing.median for timing in timings[name]],
                    "spread": [timing.spread for timing in timings[name]],
                    **peaks[name],
                }
                for name in timings
            },
            "speed_over_peft_poly": theirs / ours,
        }
    )


if __name__ == "__main__":
    main()
