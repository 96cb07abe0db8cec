"""Answers with and without kept prefixes are the same; what is reused is counted and stays within its budget."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from server.engine.config import EngineConfig
from server.engine.prefix_cache import BLOCK_TOKENS
from server.engine.request import FinishOutput
from server.errors import AdapterUnavailable
from tests.unit.engine.driver import CONTEXT, Driver, add_to_weights, make_model, random_prompt, reference_tokens

BLOCK_BYTES = 2 * 2 * BLOCK_TOKENS * 2 * 8 * 4  # layers, keys and values, tokens, heads, head_dim, fp32
CONFIG = EngineConfig(max_batch=4, max_context=CONTEXT, prefill_chunk=16)
INSTRUCTION = random_prompt(100, 2 * BLOCK_TOKENS + 3)


def prompt(number: int, rest: int = 14) -> tuple[int, ...]:
    return (*INSTRUCTION, *random_prompt(number, rest))


def computed(driver: Driver) -> int:
    """Prompt tokens computed since the last call."""
    tokens = sum(s.prefill_tokens for s in driver.stats)
    driver.stats.clear()
    return tokens


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral_sliding", "gpt2"])
@pytest.mark.parametrize(("blocks", "chunk", "seed"), [(3, 5, 0), (9, 64, 1), (40, 16, 2), (40, 2, 3)])
def test_any_traffic_gets_the_same_tokens_as_without_the_cache(family: str, blocks: int, chunk: int, seed: int) -> None:
    """Tasks that share beginnings, adapters, scores, repeats, aborts, and budgets that throw prefixes out."""
    config = replace(CONFIG, prefill_chunk=chunk, prefix_cache_bytes=blocks * 2 * BLOCK_BYTES)
    cached = Driver(make_model(family), config)
    plain = Driver(make_model(family), replace(config, prefix_cache_bytes=0))
    choose = random.Random(seed)
    handles = [None, cached.handle(1), cached.handle(2)]
    beginnings = [random_prompt(n, length) for n, length in enumerate((16, 23, 37))]
    beginnings.append((*beginnings[2][:20], *random_prompt(9, 14)))
    prompts: list[tuple[int, ...]] = []
    aborted: set[str] = set()
    for number in range(30):
        if prompts and choose.random() < 0.2:
            tokens = choose.choice(prompts)
        else:
            tokens = (*choose.choice(beginnings), *random_prompt(200 + number, choose.randint(1, 18)))
            prompts.append(tokens)
        options: dict[str, object] = {"adapter": choose.choice(handles), "max_new_tokens": choose.randint(1, 6)}
        if choose.random() < 0.2:
            options["score"] = random_prompt(300 + number, choose.randint(1, 5))
        ids = {driver.add(tokens, task=f"t{number % 3}", **options) for driver in (cached, plain)}
        assert len(ids) == 1
        for _ in range(choose.choice((0, 0, 1, 3))):
            cached.step()
        if choose.random() < 0.1:
            cached.engine.abort(f"r{number}")
            aborted.add(f"r{number}")
    cached.run()
    plain.run()
    for request_id in {f"r{n}" for n in range(30)} - aborted:
        mine, truth = cached.answer(request_id), plain.answer(request_id)
        assert mine.tokens == truth.tokens, request_id
        assert mine.finish.reason == truth.finish.reason
        assert mine.finish.token_logprobs == pytest.approx(truth.finish.token_logprobs, abs=1e-3)
    assert sum(s.reused_tokens for s in cached.stats) > 0
    assert sum(s.reused_tokens for s in plain.stats) == 0


def test_an_instruction_is_computed_once_and_another_adapter_computes_its_own() -> None:
    driver = Driver(make_model(), CONFIG)
    first, second = driver.handle(1), driver.handle(2)
    for number, (handle, tokens) in enumerate([(first, 49), (first, 14), (first, 14), (second, 49), (None, 49)]):
        request_id = driver.add(prompt(number), adapter=handle)
        driver.run()
        assert computed(driver) == tokens
        truth = add_to_weights(driver.plain, handle and handle.adapter)
        assert driver.tokens(request_id) == reference_tokens(truth, prompt(number), 8)


def test_requests_that_arrive_together_compute_their_instruction_once() -> None:
    driver = Driver(make_model(), replace(CONFIG, max_batch=8))
    ids = [driver.add(prompt(n)) for n in range(8)]
    driver.run()
    assert computed(driver) == len(INSTRUCTION) + 8 * 14
    for number, request_id in enumerate(ids):
        assert driver.tokens(request_id) == reference_tokens(driver.plain, prompt(number), 8)


def test_the_choices_of_one_input_compute_their_prompt_once() -> None:
    driver = Driver(make_model(), CONFIG)
    tokens = random_prompt(0, 3 * BLOCK_TOKENS)
    for number in range(3):
        driver.add(tokens, score=random_prompt(number, 2))
    driver.run()
    assert computed(driver) == len(tokens) + 1 + 2 * (1 + 1)


def test_nobody_waits_for_a_prompt_that_has_far_to_go_for_little_gain() -> None:
    driver = Driver(make_model(), replace(CONFIG, prefill_chunk=4))
    driver.add((*random_prompt(0, BLOCK_TOKENS), *random_prompt(1, 40)))
    short = driver.add((*random_prompt(0, BLOCK_TOKENS), 5, 6))
    for _ in range(10):
        driver.step()
    assert any(output.request_id == short for output in driver.outputs)
    driver.run()


def test_those_who_wait_go_on_when_the_one_they_waited_for_is_gone() -> None:
    driver = Driver(make_model(), replace(CONFIG, prefill_chunk=4))
    leader, *others = [driver.add(prompt(n)) for n in range(3)]
    driver.step()
    assert [s.num_computed_tokens for s in driver.engine.scheduler.all_sequences()] == [4, 0, 0]
    driver.engine.abort(leader)
    driver.run()
    for number, request_id in enumerate(others, 1):
        assert driver.tokens(request_id) == reference_tokens(driver.plain, prompt(number), 8)


@pytest.mark.parametrize("family", ["llama", "mistral_sliding"])
def test_numbers_gone_wrong_are_not_kept(family: str) -> None:
    driver = Driver(make_model(family), CONFIG)
    bad = driver.handle(1)
    for low_rank in bad.adapter.weights.values():
        low_rank.B.fill_(float("nan"))
    for number in range(3):
        finish = _last(driver, driver.add(prompt(number), adapter=bad))
        assert isinstance(finish.error, AdapterUnavailable)
    assert driver.engine.prefix_cache_bytes == 0


def test_numbers_gone_wrong_beyond_a_sliding_window_show_in_the_answer_and_are_not_kept() -> None:
    driver = Driver(make_model("mistral_sliding"), replace(CONFIG, prefill_chunk=32))
    request_id = driver.add(prompt(0))
    driver.step()
    for layer in driver.runner._attention.layers:
        with torch.inference_mode():
            layer.keys[0, 1] = float("nan")
    assert _last(driver, request_id).reason == "error"
    assert driver.engine.prefix_cache_bytes == 0


def test_a_failed_step_keeps_nothing_and_spoils_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(make_model(), replace(CONFIG, prefill_chunk=64))
    driver.add(prompt(0))
    driver.run()
    kept = driver.engine.prefix_cache_bytes

    def spoil(batch: object) -> torch.Tensor:
        for layer in driver.runner._attention.layers:
            with torch.inference_mode():
                layer.keys[0, :CONTEXT] = float("nan")
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(driver.runner, "run", spoil)
        assert _last(driver, driver.add(prompt(1))).reason == "error"
    assert driver.engine.prefix_cache_bytes == kept
    request_id = driver.add(prompt(2))
    driver.run()
    assert driver.tokens(request_id) == reference_tokens(driver.plain, prompt(2), 8)


def test_a_prefix_that_could_not_be_copied_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(make_model(), CONFIG)
    driver.add(prompt(0))
    monkeypatch.setattr(driver.runner, "save_prefix", _raise)
    with pytest.raises(RuntimeError, match="out of memory"):
        driver.run()
    assert driver.engine.prefix_cache_bytes == 0
    driver.engine.scheduler.prefixes.check_integrity()


@pytest.mark.parametrize("budget", [0, BLOCK_BYTES - 1, 3 * BLOCK_BYTES, 20 * BLOCK_BYTES])
def test_the_budget_is_kept(budget: int) -> None:
    driver = Driver(make_model(), replace(CONFIG, prefix_cache_bytes=budget))
    for number in range(20):
        driver.add((*random_prompt(number % 7, 25), *random_prompt(50 + number, 20)), max_new_tokens=1)
        driver.run()
        assert driver.engine.prefix_cache_bytes <= budget
    assert (driver.engine.prefix_cache_bytes > 0) == (budget >= BLOCK_BYTES)
    assert driver.runner.prefixes.block_bytes == BLOCK_BYTES


def _last(driver: Driver, request_id: str) -> FinishOutput:
    driver.run()
    return driver.answer(request_id).finish


def _raise(*_: object) -> None:
    raise RuntimeError("out of memory")
