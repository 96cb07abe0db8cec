from __future__ import annotations

import pytest

from server.engine.config import EngineConfig
from server.engine.request import EngineRequest, SamplingParams, Sequence, Status
from server.errors import InvalidInput


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("min_new_tokens", -1),
        ("min_new_tokens", 65),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("logprobs", -1),
        ("logprobs", 21),
    ],
)
def test_an_impossible_sampling_value_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(InvalidInput, match=field) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field


def test_an_empty_prompt_and_empty_scores_are_refused() -> None:
    with pytest.raises(InvalidInput, match="prompt has no tokens"):
        EngineRequest("r", "t", ())
    with pytest.raises(InvalidInput, match="no tokens to score"):
        EngineRequest("r", "t", (1,), score_token_ids=())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, 0) for name in ("max_batch", "max_context", "max_queue", "adapter_slots", "threads")),
        *((name, 0) for name in ("prefill_chunk", "busy_prefill_chunk")),
        ("prefix_cache_bytes", -1),
    ],
)
def test_an_impossible_engine_setting_is_refused_by_name(field: str, value: int) -> None:
    with pytest.raises(InvalidInput, match=f"{field} is {value}"):
        EngineConfig(**{field: value})


def test_fewer_adapter_slots_than_sequences_are_refused() -> None:
    with pytest.raises(InvalidInput, match="adapter_slots = 3 is less than max_batch = 4"):
        EngineConfig(max_batch=4, adapter_slots=3)


def test_a_sequence_finishes_once() -> None:
    sequence = Sequence(EngineRequest("r", "t", (1, 2)), arrival_s=1.0)
    finish = sequence.finish("abort", 3.5)
    assert sequence.status is Status.FINISHED
    assert (finish.prompt_tokens, finish.completion_tokens, finish.timing.total_s) == (2, 0, 2.5)
    assert finish.timing.queue_s is None
    with pytest.raises(AssertionError, match="finished twice"):
        sequence.finish("abort", 4.0)
