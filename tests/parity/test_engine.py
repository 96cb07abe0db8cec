"""The engine's greedy tokens against PEFT Poly's own `generate`, and against itself in other batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM, PreTrainedModel

from server.adapters.assembly import assemble
from server.adapters.injection import inject
from server.adapters.inventory import Inventory
from server.adapters.peft_format import TargetBackbone, read_poly, write_lora
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.request import AdapterHandle, EngineRequest, FinishOutput, SamplingParams, TokenOutput
from server.engine.runner import Runner

TASKS, NEW_TOKENS = 16, 14
RANDOM = torch.Generator().manual_seed(7)
PROMPTS = [
    tuple(torch.randint(1, 211, (length,), generator=RANDOM).tolist())
    for length in torch.randint(3, 40, (TASKS,), generator=RANDOM).tolist()
]


@pytest.fixture(scope="module")
def poly(tiny_llama: Callable[[], LlamaForCausalLM], random_poly: Callable[..., PeftModel]) -> PeftModel:
    return random_poly(tiny_llama(), heads=6, skills=4, rank=3, tasks=TASKS)


@pytest.fixture(scope="module")
def inventory(
    poly: PeftModel,
    tiny_llama: Callable[[], LlamaForCausalLM],
    target_of: Callable[[PreTrainedModel], TargetBackbone],
    tmp_path_factory: pytest.TempPathFactory,
) -> Inventory:
    directory = tmp_path_factory.mktemp("poly")
    poly.save_pretrained(directory)
    return read_poly(Path(directory), target_of(tiny_llama()), name="task")


@pytest.fixture(scope="module")
def requests(inventory: Inventory) -> list[EngineRequest]:
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    return [
        EngineRequest(
            id=f"request-{task}",
            task=f"task-{task}",
            prompt_token_ids=PROMPTS[task],
            sampling=sampling,
            adapter=AdapterHandle(str(task), assemble(inventory, inventory.routings[f"task-{task}"])),
        )
        for task in range(TASKS)
    ]


def make_engine(model: LlamaForCausalLM, **limits: int) -> Engine:
    config = EngineConfig(**{"max_batch": TASKS, "max_context": 128, "prefill_chunk": 64} | limits)
    return Engine(Runner(model, inject(model), config), config, frozenset({2}))


def run(engine: Engine, requests: list[EngineRequest]) -> dict[str, list[int]]:
    """Every request's tokens."""
    for request in requests:
        engine.add(request)
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    while engine.has_work:
        for output in engine.step()[0]:
            if isinstance(output, TokenOutput):
                tokens[output.request_id].append(output.token_id)
            else:
                assert isinstance(output, FinishOutput)
                assert output.reason == "length"
    engine.check_integrity()
    return tokens


def generate(model: torch.nn.Module, prompt: tuple[int, ...], **options: torch.Tensor) -> list[int]:
    tokens = torch.tensor([prompt])
    out = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        pad_token_id=0,
        eos_token_id=[],
        **options,
    )
    return out[0, len(prompt) :].tolist()


def test_every_task_in_one_batch_gives_pefts_tokens(
    poly: PeftModel, requests: list[EngineRequest], tiny_llama: Callable[[], LlamaForCausalLM]
) -> None:
    ours = run(make_engine(tiny_llama()), requests)
    for task in range(TASKS):
        theirs = generate(poly, PROMPTS[task], task_ids=torch.tensor([task]))
        assert ours[f"request-{task}"] == theirs, f"task {task}"
    assert len({tuple(tokens) for tokens in ours.values()}) == TASKS


@pytest.mark.parametrize("limits", [{"max_batch": 1}, {"max_batch": 5, "prefill_chunk": 7}, {"prefill_chunk": 1}])
def test_tokens_do_not_depend_on_the_batch(
    requests: list[EngineRequest], tiny_llama: Callable[[], LlamaForCausalLM], limits: dict[str, int]
) -> None:
    together = run(make_engine(tiny_llama()), requests)
    assert run(make_engine(tiny_llama(), **limits), requests) == together


def test_exported_loras_give_the_engines_tokens(
    requests: list[EngineRequest], tiny_llama: Callable[[], LlamaForCausalLM], tmp_path: Path
) -> None:
    ours = run(make_engine(tiny_llama()), requests)
    for task, request in enumerate(requests):
        assert request.adapter is not None
        write_lora(request.adapter.adapter, tmp_path / str(task), base_model="tiny")
        lora = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / str(task))).eval()
        assert generate(lora, PROMPTS[task]) == ours[request.id], f"task {task}"


def test_bare_request_among_tasks_gives_the_bare_models_tokens(
    requests: list[EngineRequest], tiny_llama: Callable[[], LlamaForCausalLM]
) -> None:
    bare = EngineRequest("bare", "base", PROMPTS[0], requests[0].sampling)
    ours = run(make_engine(tiny_llama()), [*requests[:7], bare, *requests[8:15]])
    assert ours["bare"] == generate(tiny_llama(), PROMPTS[0])
    assert ours["bare"] != ours["request-0"]
