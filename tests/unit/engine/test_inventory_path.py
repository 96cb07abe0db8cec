"""Rows computed from an inventory's skills: their tokens, and when it is done."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from server.adapters.assembly import assemble
from server.adapters.injection import linear_sizes
from server.adapters.inventory import Inventory
from server.engine.config import EngineConfig, Quantization
from server.engine.request import AdapterHandle
from server.native.library import load_library
from tests.unit.engine.driver import CONTEXT, Driver, add_to_weights, make_model, random_prompt, reference_tokens

CONFIG = EngineConfig(max_batch=8, max_context=CONTEXT, prefill_chunk=16, adapter_path="inventory")


@pytest.fixture(autouse=True)
def _needs_tiles() -> None:
    library = load_library()
    if library is None or not library.has_tiles:
        pytest.skip("the operators were not built or the processor has no matrix tiles")


def mixtures(model: PreTrainedModel, count: int, seed: int = 0) -> list[AdapterHandle]:
    """Random routings over one random inventory of bf16 numbers."""
    random = torch.Generator().manual_seed(seed)
    inventory = Inventory(
        A={n: _skills(random, 4, 3, i // 4, 2) for n, (i, _) in linear_sizes(model).items()},
        B={n: _skills(random, 4, 3, 2, o // 4) for n, (_, o) in linear_sizes(model).items()},
        alpha=8.0,
        backbone_fingerprint="f" * 64,
        backbone_name="tiny",
        prompt_format="",
    )
    routings = [3 * torch.randn(inventory.routing_shape, generator=random) for _ in range(count)]
    return [AdapterHandle(f"{seed}-{n}", assemble(inventory, routing)) for n, routing in enumerate(routings)]


def _skills(random: torch.Generator, *shape: int) -> torch.Tensor:
    return (0.3 * torch.randn(shape, generator=random)).bfloat16()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mistral_sliding"])
def test_tokens_are_those_of_merged_models_whoever_else_is_in_the_batch(family: str) -> None:
    model = make_model(family)
    driver = Driver(model, CONFIG)
    handles = [*mixtures(model, 4), driver.handle(1, rank=5), None, *mixtures(model, 1, seed=1)]
    ids = [driver.add(random_prompt(n, 3 + 4 * n), adapter=handle) for n, handle in enumerate(handles)]
    driver.run()
    assert {s.path for s in driver.stats} == {"slots", "inventory"}, "prompts are computed from slots"
    for n, (request_id, handle) in enumerate(zip(ids, handles, strict=True)):
        merged = add_to_weights(model, None if handle is None else handle.adapter)
        assert driver.tokens(request_id) == reference_tokens(merged, random_prompt(n, 3 + 4 * n), 8), n


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_both_paths_give_the_same_tokens(quantization: Quantization) -> None:
    model = make_model()
    config = replace(CONFIG, quantization=quantization)
    answers = []
    for path in ("inventory", "slots"):
        driver = Driver(model, replace(config, adapter_path=path))
        ids = [driver.add(random_prompt(n, 5 + n), adapter=handle) for n, handle in enumerate(mixtures(model, 8))]
        driver.run()
        assert (path == "inventory") == ("inventory" in {s.path for s in driver.stats})
        answers.append([driver.tokens(request_id) for request_id in ids])
    assert answers[0] == answers[1]


@pytest.mark.parametrize(("quantization", "least"), [("none", 8), ("int8", 16)])
def test_by_itself_it_takes_as_many_tasks_as_make_it_the_faster_one(quantization: Quantization, least: int) -> None:
    model = make_model()
    config = EngineConfig(max_batch=20, max_context=CONTEXT, prefill_chunk=64, quantization=quantization)
    for tasks in (least - 1, least):
        driver = Driver(model, config)
        for handle in [*mixtures(model, tasks), None, mixtures(model, 1)[0]]:
            driver.add((5,), adapter=handle, max_new_tokens=3, ignore_eos=True)
        driver.run()
        assert [s.path for s in driver.stats[1:]] == ["inventory" if tasks == least else "slots"] * 2


def test_an_adapter_of_few_linears_leaves_the_others_bare() -> None:
    model = make_model()
    driver = Driver(model, CONFIG)
    whole = mixtures(model, 1)[0].adapter.mixture
    assert whole is not None
    names = ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj")
    inventory = replace(
        whole.inventory,
        A={n: whole.inventory.A[n] for n in names},
        B={n: whole.inventory.B[n] for n in names},
    )
    adapter = assemble(inventory, torch.randn(inventory.routing_shape))
    request_id = driver.add(random_prompt(0, 6), adapter=AdapterHandle("few", adapter))
    driver.run()
    assert "inventory" in {s.path for s in driver.stats}
    assert driver.tokens(request_id) == reference_tokens(add_to_weights(model, adapter), random_prompt(0, 6), 8)
