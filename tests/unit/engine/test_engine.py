"""The engine against transformers' own generate, and against itself in other batches."""

from __future__ import annotations

import math
import random

import pytest
import torch

from server.adapters.assembly import Adapter
from server.engine.config import EngineConfig
from server.engine.request import AdapterHandle, EngineRequest
from server.errors import AdapterUnavailable, Conflict, InvalidInput, TooLarge, Unavailable
from tests.unit.engine.driver import (
    CONTEXT,
    EOS,
    FAMILIES,
    VOCAB,
    Driver,
    add_to_weights,
    make_model,
    random_prompt,
    reference_tokens,
)

both_implementations = pytest.mark.parametrize("operators", [True, False], ids=["compiled", "torch"])


@pytest.mark.parametrize("family", FAMILIES)
@both_implementations
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_greedy_tokens_equal_generate_whatever_the_family_and_chunk(family: str, chunk: int, operators: bool) -> None:
    config = EngineConfig(max_batch=4, max_context=CONTEXT, prefill_chunk=chunk, operators=operators)
    driver = Driver(make_model(family), config)
    prompts = [random_prompt(seed, length) for seed, length in enumerate((1, 7, 19, 12, 30, 3))]
    handles = [None, driver.handle(1), driver.handle(2), None, driver.handle(1), driver.handle(3)]
    ids = [driver.add(p, adapter=h, max_new_tokens=12) for p, h in zip(prompts, handles, strict=True)]
    driver.run()
    for request_id, prompt, handle in zip(ids, prompts, handles, strict=True):
        truth = add_to_weights(driver.plain, handle and handle.adapter)
        assert driver.tokens(request_id) == reference_tokens(truth, prompt, 12), request_id


def test_adapters_change_the_answer_so_that_the_comparison_above_means_something(driver: Driver) -> None:
    prompt = random_prompt(5, 6)
    answers = {
        tuple(reference_tokens(add_to_weights(driver.plain, driver.handle(s).adapter), prompt, 8)) for s in (1, 2)
    }
    answers.add(tuple(reference_tokens(driver.plain, prompt, 8)))
    assert len(answers) == 3


@both_implementations
def test_joins_and_leaves_in_a_running_batch_do_not_change_any_answer(operators: bool) -> None:
    config = EngineConfig(max_batch=5, max_context=CONTEXT, prefill_chunk=9, operators=operators)
    driver = Driver(make_model(), config)
    choose = random.Random(0)
    handles = [None, *(driver.handle(seed, rank=seed % 3 + 1) for seed in range(1, 7))]
    wanted = {}
    for number in range(30):
        prompt = random_prompt(number, choose.randint(1, 25))
        handle = choose.choice(handles)
        length = choose.randint(1, 15)
        request_id = driver.add(prompt, task=f"t{number % 4}", adapter=handle, max_new_tokens=length)
        wanted[request_id] = (prompt, handle, length)
        for _ in range(choose.randint(0, 3)):
            driver.step()
    driver.run()
    for request_id, (prompt, handle, length) in wanted.items():
        truth = add_to_weights(driver.plain, handle and handle.adapter)
        assert driver.tokens(request_id) == reference_tokens(truth, prompt, length), request_id


@both_implementations
def test_tasks_at_once_give_the_same_tokens_as_one_at_a_time(operators: bool) -> None:
    config = EngineConfig(max_batch=16, max_context=CONTEXT, operators=operators)
    together, alone = Driver(make_model(), config), Driver(make_model(), config)
    prompts = [random_prompt(n, 4 + n) for n in range(16)]
    ids = [together.add(p, task=str(n), adapter=together.handle(n)) for n, p in enumerate(prompts)]
    together.run()
    for number, (request_id, prompt) in enumerate(zip(ids, prompts, strict=True)):
        single = alone.add(prompt, adapter=alone.handle(number))
        alone.run()
        assert together.tokens(request_id) == alone.tokens(single)
    assert max(s.distinct_tasks for s in together.stats) == 16
    assert {s.path for s in together.stats} == {"slots"}


def test_a_bare_request_beside_adapters_equals_the_bare_backbone_and_alone_takes_the_bare_path(driver: Driver) -> None:
    prompt = random_prompt(1, 9)
    mixed = driver.add(prompt)
    driver.add(prompt, adapter=driver.handle(1))
    driver.run()
    before = len(driver.stats)
    alone = driver.add(prompt)
    driver.run()
    assert driver.tokens(mixed) == driver.tokens(alone) == reference_tokens(driver.plain, prompt, 8)
    assert {s.path for s in driver.stats[before:]} == {"bare"}


def test_adapters_over_some_linears_leave_nothing_of_the_slots_former_owner() -> None:
    driver = Driver(make_model(), EngineConfig(max_batch=1, max_context=CONTEXT))
    prompt = random_prompt(2, 8)
    everything = driver.handle(1, rank=3)
    some = driver.handle(2, rank=1, linears=("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"))
    ids = [driver.add(prompt, adapter=handle) for handle in (everything, some)]
    driver.run()
    for request_id, handle in zip(ids, (everything, some), strict=True):
        truth = add_to_weights(driver.plain, handle.adapter)
        assert driver.tokens(request_id) == reference_tokens(truth, prompt, 8)


def test_end_of_text_ends_with_stop_and_is_handed_out_once() -> None:
    for seed in range(200):
        driver = Driver(make_model())
        expected = reference_tokens(driver.plain, random_prompt(seed, 5), 40)
        if expected[-1] == EOS and len(expected) > 2:
            break
    stopped = driver.add(random_prompt(seed, 5), max_new_tokens=40)
    ignoring = driver.add(random_prompt(seed, 5), max_new_tokens=40, ignore_eos=True)
    longer = driver.add(random_prompt(seed, 5), max_new_tokens=40, min_new_tokens=len(expected) + 3)
    driver.run()
    answer = driver.answer(stopped)
    assert answer.tokens == expected
    assert answer.finish.reason == "stop"
    assert answer.finish.completion_tokens == len(expected)
    assert len(driver.tokens(ignoring)) == 40
    assert EOS not in driver.tokens(longer)[: len(expected) + 3]
    assert len(driver.tokens(longer)) > len(expected)


def test_the_contexts_end_ends_with_length(driver: Driver) -> None:
    request_id = driver.add(random_prompt(0, CONTEXT - 3), max_new_tokens=50, ignore_eos=True)
    driver.run()
    answer = driver.answer(request_id)
    assert (answer.finish.reason, answer.finish.prompt_tokens, len(answer.tokens)) == ("length", CONTEXT - 3, 3)


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_scores_equal_the_models_own_log_probabilities(chunk: int) -> None:
    driver = Driver(make_model(), EngineConfig(max_batch=4, max_context=CONTEXT, prefill_chunk=chunk))
    handle = driver.handle(4)
    cases = [(random_prompt(n, 3 + 4 * n), random_prompt(50 + n, 1 + n), handle if n % 2 else None) for n in range(5)]
    ids = [driver.add(p, score=s, adapter=h) for p, s, h in cases]
    driver.add(random_prompt(9, 4))
    driver.run()
    for request_id, (prompt, scored, own) in zip(ids, cases, strict=True):
        model = add_to_weights(driver.plain, own and own.adapter)
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + scored])).logits[0].log_softmax(-1)
        expected = [logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(scored)]
        answer = driver.answer(request_id)
        assert answer.finish.reason == "scored"
        assert answer.tokens == []
        assert answer.finish.completion_tokens == 0
        assert answer.finish.token_logprobs == pytest.approx(expected, abs=1e-3)


def test_an_aborted_request_ends_once_and_its_neighbours_go_on(driver: Driver) -> None:
    prompts = [random_prompt(n, 20) for n in range(12)]
    ids = [driver.add(p, adapter=driver.handle(n)) for n, p in enumerate(prompts)]
    driver.step()
    running, prefilling, waiting = ids[0], ids[5], ids[11]
    for request_id in (prefilling, waiting):
        driver.engine.abort(request_id)
    driver.step()
    driver.step()
    driver.engine.abort(running)
    driver.engine.abort("unknown")
    driver.run()
    driver.engine.abort(running)
    assert not driver.engine.has_work
    for number, request_id in enumerate(ids):
        answer = driver.answer(request_id)
        if request_id in (running, prefilling, waiting):
            assert answer.finish.reason == "abort"
        else:
            truth = add_to_weights(driver.plain, driver.handle(number).adapter)
            assert answer.tokens == reference_tokens(truth, prompts[number], 8)


def test_a_prompt_as_long_as_the_context_is_refused_with_both_numbers_and_ends(driver: Driver) -> None:
    request_id = driver.add(random_prompt(0, CONTEXT))
    driver.run()
    finish = driver.answer(request_id).finish
    assert finish.reason == "error"
    assert isinstance(finish.error, TooLarge)
    assert f"{CONTEXT} tokens" in finish.error.message
    with pytest.raises(TooLarge, match="66 tokens and the context holds 64"):
        driver.engine.check(EngineRequest("x", "t", random_prompt(0, 60), score_token_ids=(5,) * 6))


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_a_token_outside_the_vocabulary_is_refused(driver: Driver, token: int) -> None:
    with pytest.raises(InvalidInput, match="vocabulary of 97"):
        driver.engine.check(EngineRequest("x", "t", (5, token)))


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    driver = Driver(make_model(), EngineConfig(max_batch=1, max_context=CONTEXT, max_queue=2))
    ids = [driver.add(random_prompt(n, 4)) for n in range(3)]
    driver.run()
    refused = driver.answer(ids[2]).finish
    assert isinstance(refused.error, Unavailable)
    assert refused.error.code == "queue_full"
    assert refused.error.retry_after_s > 0
    assert [driver.answer(i).finish.reason for i in ids[:2]] == ["length", "length"]


def test_two_open_requests_of_one_id_are_refused(driver: Driver) -> None:
    driver.engine.add(EngineRequest("same", "t", (5, 6)))
    with pytest.raises(Conflict, match="same"):
        driver.engine.add(EngineRequest("same", "t", (5, 6)))


def test_an_adapter_that_does_not_fit_ends_its_own_request_alone(driver: Driver) -> None:
    fitting = driver.handle(1)
    wrong = {name.replace("layers.0", "layers.7"): pair for name, pair in fitting.adapter.weights.items()}
    prompt = random_prompt(3, 6)
    broken = driver.add(prompt, adapter=AdapterHandle("wrong", Adapter(wrong, alpha=2.0, rank=2)))
    fine = driver.add(prompt)
    driver.run()
    finish = driver.answer(broken).finish
    assert isinstance(finish.error, AdapterUnavailable)
    assert "layers.7" in finish.error.message
    assert driver.tokens(fine) == reference_tokens(driver.plain, prompt, 8)


def test_numbers_gone_wrong_in_one_adapter_do_not_reach_neighbours_or_later_owners_of_the_slot() -> None:
    driver = Driver(make_model(), EngineConfig(max_batch=2, max_context=CONTEXT, prefill_chunk=64))
    good = driver.handle(1)
    bad = driver.handle(2)
    for low_rank in bad.adapter.weights.values():
        low_rank.B.fill_(float("nan"))
    prompt = random_prompt(4, 20)
    spoiled = driver.add(prompt, adapter=bad)
    scored = driver.add(prompt, adapter=bad, score=(5, 6))
    beside = driver.add(prompt, adapter=good)
    later = [driver.add(prompt[:3], adapter=good) for _ in range(4)]
    driver.run()
    for request_id in (spoiled, scored):
        finish = driver.answer(request_id).finish
        assert isinstance(finish.error, AdapterUnavailable)
        assert "not finite" in finish.error.message
    truth = add_to_weights(driver.plain, good.adapter)
    assert driver.tokens(beside) == reference_tokens(truth, prompt, 8)
    for request_id in later:
        assert driver.tokens(request_id) == reference_tokens(truth, prompt[:3], 8)


def test_a_failing_step_ends_its_requests_and_the_engine_goes_on(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = driver.add(random_prompt(0, 5), adapter=driver.handle(1))
    with monkeypatch.context() as patch:
        patch.setattr(driver.runner, "run", _raise)
        driver.step()
    finish = driver.answer(first).finish
    assert finish.reason == "error"
    assert "out of luck" in str(finish.error)
    second = driver.add(random_prompt(0, 5))
    driver.run()
    assert driver.tokens(second) == reference_tokens(driver.plain, random_prompt(0, 5), 8)


def test_what_a_failed_step_may_have_written_is_wiped(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.add(random_prompt(0, 5))
    driver.step()
    layers = driver.runner._attention._layers.values()
    assert all(layer.keys.any() for layer in layers)
    monkeypatch.setattr(driver.runner, "run", _raise)
    driver.step()
    assert not any(layer.keys.any() or layer.values.any() for layer in layers)


def test_a_busy_task_does_not_starve_another() -> None:
    driver = Driver(make_model(), EngineConfig(max_batch=2, max_context=CONTEXT))
    busy = [driver.add(random_prompt(n, 5), task="busy", ignore_eos=True) for n in range(20)]
    driver.step()
    other = driver.add(random_prompt(50, 5), task="other", ignore_eos=True)
    driver.run()
    ends = [o.request_id for o in driver.outputs if o in [driver.answer(i).finish for i in (*busy, other)]]
    assert ends.index(other) <= 3


def test_timing_and_stats_tell_what_happened(driver: Driver) -> None:
    request_id = driver.add(random_prompt(0, 20), max_new_tokens=3, ignore_eos=True)
    driver.run()
    timing = driver.answer(request_id).finish.timing
    assert timing.queue_s is not None
    assert timing.first_token_s is not None
    assert 0 <= timing.queue_s <= timing.first_token_s <= timing.total_s
    assert [(s.prefill_tokens, s.decode_rows, s.generated_tokens) for s in driver.stats] == [
        (16, 0, 0),
        (4, 0, 1),
        (0, 1, 1),
        (0, 1, 1),
    ]
    assert all(s.seconds > 0 and math.isfinite(s.seconds) for s in driver.stats)
    assert driver.engine.scheduler.num_active == 0


def test_the_model_keeps_its_own_attention_between_steps(driver: Driver) -> None:
    served = driver.runner._model
    driver.add(random_prompt(0, 20))
    driver.step()
    tokens = torch.tensor([random_prompt(1, 9)])
    with torch.inference_mode():
        torch.testing.assert_close(served(tokens).logits, driver.plain(tokens).logits)
    driver.run()


def _raise(*_: object) -> None:
    raise RuntimeError("out of luck")
