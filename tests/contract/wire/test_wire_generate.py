"""POST /generate: every parameter has its effect."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture
def generate(client: httpx.Client) -> Callable[..., dict[str, Any]]:
    def call(task_id: str = "capital", inputs: Any = "France", *, raw_prompt: bool = False, **parameters: Any) -> Any:
        body = {"task_id": task_id, "inputs": inputs, "parameters": parameters, "raw_prompt": raw_prompt}
        answer = client.post("/generate", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    return call


def token_ids(answer: dict[str, Any], index: int = 0) -> list[int]:
    return [token["token_id"] for token in answer["outputs"][index]["logprobs"]]


def test_the_answer_has_the_documented_parts(generate: Callable[..., dict[str, Any]]) -> None:
    answer = generate(max_new_tokens=5)
    assert (answer["task_id"], answer["version"]) == ("capital", 1)
    [output] = answer["outputs"]
    assert output["index"] == 0
    assert output["finish_reason"] == "length"
    assert output["completion_tokens"] == 5
    assert output["logprobs"] is None
    assert answer["usage"] == {
        "prompt_tokens": output["prompt_tokens"],
        "completion_tokens": 5,
        "total_tokens": output["prompt_tokens"] + 5,
    }
    assert 0 <= answer["timing"]["queue_ms"] <= answer["timing"]["ttft_ms"] <= answer["timing"]["total_ms"]


def test_tasks_answer_differently_and_base_and_mu_are_there(generate: Callable[..., dict[str, Any]]) -> None:
    prompt = {"inputs": "The same prompt", "raw_prompt": True, "max_new_tokens": 12, "logprobs": 0}
    answers = {task: tuple(token_ids(generate(task, **prompt))) for task in ("base", "mu", "capital", "rhyme")}
    assert len(set(answers.values())) == 4
    assert generate("base", max_new_tokens=1)["version"] is None


def test_a_version_can_be_named(generate: Callable[..., dict[str, Any]]) -> None:
    assert generate("capital@1", max_new_tokens=1)["version"] == 1


def test_the_prompt_has_the_tasks_instruction_unless_it_is_raw(generate: Callable[..., dict[str, Any]]) -> None:
    rendered = "Definition: Do capital.\n\nInput: France\n\nOutput:"
    assert generate(max_new_tokens=1)["usage"]["prompt_tokens"] == len(rendered)
    assert generate(raw_prompt=True, max_new_tokens=1)["usage"]["prompt_tokens"] == len("France")
    same = generate(inputs=rendered, raw_prompt=True, max_new_tokens=9, logprobs=0)
    assert token_ids(same) == token_ids(generate(max_new_tokens=9, logprobs=0))


def test_many_inputs_and_answers_are_indexed(generate: Callable[..., dict[str, Any]]) -> None:
    answer = generate(inputs=["one", "two!"], n=2, max_new_tokens=6)
    assert [output["index"] for output in answer["outputs"]] == [0, 1, 2, 3]
    first, copy, *others = [output["text"] for output in answer["outputs"]]
    assert first == copy  # greedy
    alone = generate(inputs="two!", max_new_tokens=6)
    assert others == [alone["outputs"][0]["text"]] * 2
    prompts = [output["prompt_tokens"] for output in answer["outputs"]]
    assert answer["usage"]["prompt_tokens"] == prompts[0] + prompts[2]  # a prompt counts once


def test_a_seed_repeats_and_n_answers_differ(generate: Callable[..., dict[str, Any]]) -> None:
    sampled = {"temperature": 1.5, "seed": 7, "n": 2, "max_new_tokens": 16, "logprobs": 0}
    first, second = generate(**sampled), generate(**sampled)
    assert token_ids(first) == token_ids(second)
    assert token_ids(first, 0) != token_ids(first, 1)
    assert token_ids(generate(**{**sampled, "seed": 8})) != token_ids(first)


@pytest.mark.parametrize("narrowing", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_narrowed_sampling_is_greedy(generate: Callable[..., dict[str, Any]], narrowing: dict[str, float]) -> None:
    greedy = generate(max_new_tokens=12, logprobs=0)
    sampled = generate(max_new_tokens=12, logprobs=0, temperature=2.0, seed=1, **narrowing)
    assert token_ids(sampled) == token_ids(greedy)


def test_a_repetition_penalty_changes_the_answer(generate: Callable[..., dict[str, Any]]) -> None:
    plain = generate("base", "aaaa", raw_prompt=True, max_new_tokens=24, logprobs=0)
    penalised = generate("base", "aaaa", raw_prompt=True, max_new_tokens=24, logprobs=0, repetition_penalty=5.0)
    assert len(set(token_ids(penalised))) > len(set(token_ids(plain)))


def test_logprobs_come_with_alternatives(generate: Callable[..., dict[str, Any]]) -> None:
    [output] = generate(max_new_tokens=3, logprobs=2)["outputs"]
    assert len(output["logprobs"]) == 3
    for token in output["logprobs"]:
        assert [token["token_id"], token["logprob"]] == [token["top"][0]["token_id"], token["top"][0]["logprob"]]
        assert token["top"][0]["logprob"] >= token["top"][1]["logprob"]
        assert len(token["top"]) == 2


def test_stop_strings_end_the_answer_before_them(generate: Callable[..., dict[str, Any]]) -> None:
    text = generate(max_new_tokens=32, ignore_eos=True)["outputs"][0]["text"]
    stop = text[10:12]
    place = text.index(stop)
    [output] = generate(max_new_tokens=32, ignore_eos=True, stop=[stop, "never to be seen"])["outputs"]
    assert (output["text"], output["finish_reason"]) == (text[:place], "stop_sequence")
    assert output["completion_tokens"] < 32
    assert generate(max_new_tokens=32, ignore_eos=True, stop=stop)["outputs"][0]["text"] == text[:place]


def end_token_bias(generate: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Sampling under which the end token comes early."""
    for seed in range(40):
        sampled = {"temperature": 3.0, "seed": seed, "max_new_tokens": 60, "logprobs": 0}
        answer = generate(**sampled)
        if answer["outputs"][0]["finish_reason"] == "stop" and answer["outputs"][0]["completion_tokens"] > 1:
            return sampled
    raise AssertionError("no seed ends early")


def test_the_end_token_ends_unless_it_is_ignored_or_barred(generate: Callable[..., dict[str, Any]]) -> None:
    sampled = end_token_bias(generate)
    [ended] = generate(**sampled)["outputs"]
    assert ended["logprobs"][-1]["token"] == "</s>"
    assert "</s>" not in ended["text"]
    [ignored] = generate(**sampled, ignore_eos=True)["outputs"]
    assert (ignored["finish_reason"], ignored["completion_tokens"]) == ("length", 60)
    [barred] = generate(**sampled, min_new_tokens=ended["completion_tokens"])["outputs"]
    assert barred["completion_tokens"] > ended["completion_tokens"] - 1
    assert barred["logprobs"][ended["completion_tokens"] - 1]["token"] != "</s>"


def test_choices_are_ranked_by_their_mean_log_likelihood(generate: Callable[..., dict[str, Any]]) -> None:
    choices = ["yes", "no", "perhaps"]
    [first, second] = generate(inputs=["France", "Peru"], choices=choices)["outputs"]
    assert [score["text"] for score in first["scores"]] == choices
    best = max(first["scores"], key=lambda score: score["score"])
    assert first["text"] == best["text"]
    assert best["score"] == pytest.approx(best["logprob"] / best["tokens"])
    assert [s["score"] for s in first["scores"]] != [s["score"] for s in second["scores"]]


def test_a_choices_score_is_the_models_own(generate: Callable[..., dict[str, Any]], tiny_model: Path) -> None:
    [score] = generate("base", "abc", raw_prompt=True, choices=["xyz"])["outputs"][0]["scores"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokens = tokenizer("abcxyz", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        logprobs = model(tokens).logits[0].log_softmax(-1)  # (tokens, vocabulary)
    expected = sum(logprobs[place - 1, tokens[0, place]].item() for place in (3, 4, 5))
    assert score["tokens"] == 3
    assert score["logprob"] == pytest.approx(expected, rel=1e-4)


def test_a_request_of_many_tasks_at_once_answers_as_one_at_a_time(client: httpx.Client) -> None:
    bodies = [
        {"task_id": task, "inputs": f"word {i}", "parameters": {"max_new_tokens": 12, "logprobs": 0}}
        for i in range(4)
        for task in ("base", "mu", "capital", "rhyme")
    ]
    alone = [token_ids(client.post("/generate", json=body).json()) for body in bodies]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda body: token_ids(client.post("/generate", json=body).json()), bodies))
    assert together == alone


def test_a_tasks_defaults_hold_unless_the_request_says_otherwise(
    client: httpx.Client, generate: Callable[..., dict[str, Any]]
) -> None:
    client.put("/tasks/with-defaults", json={"defaults": {"max_new_tokens": 3, "min_new_tokens": 3, "seed": 5}})
    assert generate("with-defaults")["usage"]["completion_tokens"] == 3
    assert generate("with-defaults", max_new_tokens=2)["usage"]["completion_tokens"] == 2
    assert generate("with-defaults", choices=["a", "b"])["outputs"][0]["text"] in ("a", "b")
