from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from server.adapters.assembly import Adapter, LowRank
from server.engine import merged
from server.engine.config import EngineConfig
from server.engine.merged import MergedCopies, copy_bytes, merge
from server.engine.request import AdapterHandle
from server.errors import InvalidInput
from tests.support.int8 import needs_int8
from tests.unit.engine.driver import CONTEXT, Driver, add_to_weights, make_model, random_prompt, reference_tokens

CONFIG = EngineConfig(max_batch=8, max_context=CONTEXT, prefill_chunk=16)
MERGED = replace(CONFIG, adapter_path="merged")
LINEARS = {"q": nn.Linear(6, 4, bias=False), "c": Conv1D(5, 6)}


def handle(key: str, *linears: str) -> AdapterHandle:
    sizes = {"q": (6, 4), "c": (6, 5)}
    weights = {n: LowRank(torch.randn(sizes[n][0], 2), torch.randn(2, sizes[n][1])) for n in linears or ("q", "c")}
    return AdapterHandle(key, Adapter(weights=weights, alpha=3.0, rank=2))


def copies(num: int, *, after_steps: int = 1, wait: bool = True) -> MergedCopies:
    return MergedCopies(LINEARS, num * copy_bytes(LINEARS), after_steps, wait)


def wait_for_entries(kept: MergedCopies, number: int) -> None:
    for _ in range(2000):
        if kept.stats().entries == number:
            return
        time.sleep(0.005)
    raise AssertionError(f"{kept.stats()} after 10 s")


def test_merged_weights_are_summed_in_fp32_and_cast_once() -> None:
    linears = {"q": nn.Linear(6, 4).bfloat16(), "c": Conv1D(5, 6)}
    adapter = handle("a").adapter
    weights = merge(linears, adapter).weights
    exact = linears["q"].weight.float() + 1.5 * (adapter.weights["q"].A @ adapter.weights["q"].B).T
    torch.testing.assert_close(weights["q"], exact.bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(
        weights["c"], (linears["c"].weight + 1.5 * adapter.weights["c"].A @ adapter.weights["c"].B).T
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "phi", "mistral_sliding"])
def test_merged_tokens_are_those_of_slots_and_of_a_merged_model(family: str) -> None:
    model = make_model(family)
    answers = []
    for config, path in ((MERGED, "merged"), (replace(CONFIG, adapter_path="slots"), "slots")):
        driver = Driver(model, config)
        adapter = driver.handle(1, rank=3)
        before = {name: p.clone() for name, p in driver.runner._model.named_parameters()}
        ids = [driver.add(random_prompt(n, 4 + 3 * n), adapter=adapter) for n in range(5)]
        driver.run()
        assert {s.path for s in driver.stats} == {path}
        answers.append([driver.tokens(i) for i in ids])
        assert all(torch.equal(p, before[name]) for name, p in driver.runner._model.named_parameters())
    expected = [
        reference_tokens(add_to_weights(model, adapter.adapter), random_prompt(n, 4 + 3 * n), 8) for n in range(5)
    ]
    assert answers[0] == answers[1] == expected


def test_a_second_task_that_comes_and_goes_changes_the_path_and_no_token() -> None:
    model = make_model()
    driver = Driver(model, MERGED)
    adapter, other = driver.handle(1), driver.handle(2)
    first = driver.add(random_prompt(0, 6), task="a", adapter=adapter, max_new_tokens=20, ignore_eos=True)
    for _ in range(4):
        driver.step()
    second = driver.add(random_prompt(1, 5), task="b", adapter=other, max_new_tokens=4, ignore_eos=True)
    bare = driver.add(random_prompt(2, 5), task="base", max_new_tokens=6, ignore_eos=True)
    driver.run()
    paths = [s.path for s in driver.stats]
    assert paths[:4] == ["merged"] * 4
    assert paths[4] == "slots"
    assert paths[-1] == "merged"
    alone = Driver(model, replace(CONFIG, adapter_path="slots"))
    for request_id, seed, length, own, tokens in (
        (first, 0, 6, adapter, 20),
        (second, 1, 5, other, 4),
        (bare, 2, 5, None, 6),
    ):
        again = alone.add(random_prompt(seed, length), adapter=own, max_new_tokens=tokens, ignore_eos=True)
        alone.run()
        assert alone.tokens(again) == driver.tokens(request_id)


def test_an_adapter_of_few_linears_leaves_the_others_bare() -> None:
    model = make_model()
    driver = Driver(model, MERGED)
    adapter = driver.handle(1, linears=("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"))
    request_id = driver.add(random_prompt(0, 6), adapter=adapter)
    driver.run()
    assert {s.path for s in driver.stats} == {"merged"}
    assert driver.tokens(request_id) == reference_tokens(add_to_weights(model, adapter.adapter), random_prompt(0, 6), 8)


def test_a_copy_is_made_beside_the_steps_after_enough_of_them() -> None:
    driver = Driver(make_model(), replace(CONFIG, merged_tasks=1, merge_after_steps=5))
    adapter = driver.handle(1)
    driver.add(random_prompt(0, 4), adapter=adapter, max_new_tokens=4, ignore_eos=True)
    driver.run()  # 4 steps
    assert driver.runner.merged_stats().entries == 0
    driver.add(random_prompt(0, 4), adapter=adapter, max_new_tokens=2, ignore_eos=True)
    driver.step()
    wait_for_entries(driver.runner._merged, 1)
    driver.run()
    assert [s.path for s in driver.stats[:4]] == ["slots"] * 4  # the fifth begins it, and may see its end
    assert driver.stats[-1].path == "merged"


def test_steps_go_on_with_slots_while_a_copy_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    exact = merged.merge
    monkeypatch.setattr(merged, "merge", lambda *given: (go.wait(10), exact(*given))[1])
    kept = copies(2, wait=False)
    a = handle("a")
    assert kept.take(a) is None
    assert kept.take(a) is None
    assert kept.take(handle("b")) is None  # one at a time: b is not begun
    go.set()
    wait_for_entries(kept, 1)
    assert kept.take(a) is not None


def test_only_consecutive_steps_count() -> None:
    kept = copies(2, after_steps=3, wait=False)
    a, b = handle("a"), handle("b")
    for step in (a, a, b, a, a, None, a, a):
        assert kept.take(step) is None
    assert kept._builder is None
    kept.take(a)
    wait_for_entries(kept, 1)


def test_the_least_recently_used_copy_leaves_for_a_new_one() -> None:
    kept = copies(2)
    a, b, c = handle("a"), handle("b"), handle("c")
    for step in (a, b, a, c):
        assert kept.take(step) is not None
        kept.check_integrity()
    assert (kept.stats().entries, kept.stats().evictions) == (2, 1)
    assert kept._find("b") is None
    assert kept._find("a") is not None
    assert kept.stats().bytes == 2 * copy_bytes(LINEARS)


def test_a_copy_of_few_linears_takes_few_bytes() -> None:
    kept = copies(1)
    kept.take(handle("a", "q"))
    assert kept.stats().bytes == 4 * 6 * 4


def test_a_copy_above_the_budget_is_never_made() -> None:
    kept = MergedCopies(LINEARS, copy_bytes(LINEARS) - 1, 1, wait=True)
    assert kept.take(handle("a")) is None
    assert kept.take(handle("b", "q")) is not None
    assert copies(0).take(handle("a")) is None


def test_an_adapter_that_cannot_be_merged_is_tried_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = []

    def fail(*_: object) -> None:
        tries.append(1)
        raise MemoryError("too large")

    monkeypatch.setattr(merged, "merge", fail)
    kept = copies(1)
    for _ in range(3):
        assert kept.take(handle("a")) is None
    assert len(tries) == 1
    assert "merging adapter a failed" in caplog.text
    kept.check_integrity()


def test_a_copy_is_kept_unasked_for_a_small_model() -> None:
    asked = {"max_batch": 2, "max_context": CONTEXT}
    linear_bytes = copy_bytes(
        {n: m for n, m in make_model().named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    )
    for config, budget in (
        (EngineConfig(**asked), linear_bytes),
        (EngineConfig(**asked, merged_tasks=3), 3 * linear_bytes),
        (EngineConfig(**asked, merged_tasks=0), 0),
        (EngineConfig(**asked, merged_tasks=3, adapter_path="slots"), 0),
    ):
        assert Driver(make_model(), config).runner._merged._budget_bytes == budget


@needs_int8
def test_no_copy_is_kept_of_int8() -> None:
    config = EngineConfig(max_batch=2, max_context=CONTEXT, quantization="int8")
    assert Driver(make_model(), config).runner._merged._budget_bytes == 0


@pytest.mark.parametrize("options", [{"merged_tasks": 1}, {"adapter_path": "merged"}])
def test_merged_copies_of_int8_weights_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InvalidInput, match="int8 weights are not merged"):
        EngineConfig(quantization="int8", **options)
