"""The method's promise on a family of tasks whose shared skills are known.

An input is a small and a capital letter. A task replaces the small one by one of five fixed permutations and the
capital one by one of five others; its answer is both. Twenty of the 25 combinations train an inventory. The other
five are new tasks that recombine what the inventory saw, each with ten examples, two of them for early stopping. The
eight others name at most eight of ten letters of each kind, so that nobody who starts from them alone can answer for
the rest; a routing that finds the two permutations again answers all.

The backbone is a tiny Llama that was taught to copy its input and nothing else, then frozen.
"""

from __future__ import annotations

import json
import random
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from server.adapters.assembly import Adapter, assemble
from server.adapters.inventory import Inventory
from server.backbone import Backbone, load_backbone
from server.training.adapt import AdaptSpec, adapt, split_examples
from server.training.answering import Answerer
from server.training.examples import Example
from server.training.methods import Hyperparameters, Method
from server.training.pretrain import pretrain
from server.training.pretrain_config import PretrainConfig, choose_layout
from server.training.prompts import DEFAULT_PROMPT_FORMAT, encode_answer, encode_prompt, render_prompt
from server.training.trainer import TrainerConfig
from tests.support.tiny_server import write_tiny_model

SMALL, CAPITAL = "abcdefghij", "ABCDEFGHIJ"
NUM_PERMUTATIONS = 5
SHOTS = 10
SEED = 0


class _Family:
    """The tasks: task (i, j) permutes small letters by permutation i and capital letters by permutation j."""

    def __init__(self, seed: int) -> None:
        random_ = random.Random(seed)
        self._small = [dict(zip(SMALL, random_.sample(SMALL, 10), strict=True)) for _ in range(NUM_PERMUTATIONS)]
        self._capital = [dict(zip(CAPITAL, random_.sample(CAPITAL, 10), strict=True)) for _ in range(NUM_PERMUTATIONS)]
        self.new = [(i, i) for i in range(NUM_PERMUTATIONS)]
        self.known = [(i, j) for i, j in product(range(NUM_PERMUTATIONS), repeat=2) if i != j]

    def examples(self, task: tuple[int, int]) -> list[Example]:
        """All hundred of a task."""
        small, capital = self._small[task[0]], self._capital[task[1]]
        return [Example(x + y, (small[x] + capital[y],)) for x, y in product(SMALL, CAPITAL)]


class _Alone:
    def should_stop(self) -> bool:
        return False

    def report(self, event: str, data: dict[str, Any]) -> None:
        pass

    def save(self, checkpoint: bytes) -> None:
        pass


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("synthetic")


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    """A tiny Llama that answers every prompt with its input."""
    write_tiny_model(folder / "model")  # for its tokenizer of bytes
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows, answer_length = [], 0
    for x, y in product(SMALL, CAPITAL):
        answer = [*encode_answer(tokenizer, x + y), tokenizer.eos_token_id]
        rows.append([*_prompt(tokenizer, x + y), *answer])
        answer_length = len(answer)
    tokens = torch.tensor(rows)  # (100, T): every prompt is as long as the next
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(250):
        batch = tokens[torch.randint(len(tokens), (32,))]
        logits = model(input_ids=batch).logits[:, -answer_length - 1 : -1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, -answer_length:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "model")
    return load_backbone(str(folder / "model"), folder / "cache")


@pytest.fixture(scope="module")
def family() -> _Family:
    return _Family(SEED)


@pytest.fixture(scope="module")
def inventory(folder: Path, backbone: Backbone, family: _Family) -> Inventory:
    """An MHR inventory of six skills and two heads, trained on the known tasks."""
    (folder / "tasks").mkdir()
    for i, j in family.known:
        rows = [{"input": example.input, "output": example.outputs[0]} for example in family.examples((i, j))]
        (folder / "tasks" / f"task-{i}-{j}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PretrainConfig(
        folder / "tasks",
        folder / "run",
        layout=choose_layout(num_heads=2, num_skills=6),
        batch_size=32,
        checkpoint_every=1000,
        trainer=TrainerConfig(steps=400, adapter_lr=5e-3, routing_lr=0.1, seed=SEED),
    )
    path = pretrain(config, backbone)
    assert path is not None
    return Inventory.from_bytes(path.read_bytes())


def test_routing_recovers_new_tasks_that_a_lora_from_scratch_does_not(
    backbone: Backbone, inventory: Inventory, family: _Family
) -> None:
    routed_settings = Hyperparameters(steps=100, routing_lr=0.1, patience=100)
    loras = [Hyperparameters(steps=60, adapter_lr=lr, patience=100) for lr in (3e-3, 1e-2)]
    routed, scratch = [], []
    for number, task in enumerate(family.new):
        examples = family.examples(task)
        random.Random(number).shuffle(examples)
        shots, others = examples[:SHOTS], examples[SHOTS:]
        routing = _learn(Method.MHR_Z, routed_settings, shots, backbone, inventory)
        routed.append(_exact_match(routing, others, backbone))
        # The better of two learning rates, chosen on the very answers that count: no one can say it was held back.
        tries = [_learn(Method.LORA, settings, shots, backbone, None) for settings in loras]
        scratch.append(max(_exact_match(adapter, others, backbone) for adapter in tries))
    # Means seen with three values of SEED: 0.78 to 0.85 for the routing, 0.27 to 0.31 for the LoRA.
    assert mean(routed) >= 0.65, (routed, scratch)
    assert mean(scratch) <= 0.4, (routed, scratch)
    assert all(route > lora for route, lora in zip(routed, scratch, strict=True))


def _learn(
    method: Method, settings: Hyperparameters, shots: list[Example], backbone: Backbone, inventory: Inventory | None
) -> Adapter:
    train, validation = split_examples(shots, None, 0.25, SEED)
    spec = AdaptSpec(method, "", train, validation, DEFAULT_PROMPT_FORMAT, settings, SEED)
    result = adapt(spec, backbone, inventory, None, _Alone())
    if result.adapter is not None:
        return result.adapter
    assert inventory is not None
    assert result.routing is not None
    return assemble(inventory, result.routing)


def _exact_match(adapter: Adapter, examples: list[Example], backbone: Backbone) -> float:
    prompts = [_prompt(backbone.tokenizer, example.input) for example in examples]
    answers = Answerer(backbone, max_new_tokens=4).generate(prompts, adapter, "\n")
    return mean(answer == example.outputs[0] for answer, example in zip(answers, examples, strict=True))


def _prompt(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(encode_prompt(tokenizer, render_prompt(DEFAULT_PROMPT_FORMAT, "", text)))
