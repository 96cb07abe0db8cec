"""The scheduler alone, without a model and without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.config import EngineConfig
from server.engine.request import EngineRequest, Sequence, Status
from server.engine.scheduler import QueueFull, Scheduler, StepPlan


def make(task: str, number: int, prompt: int = 5, score: int = 0) -> Sequence:
    scored = tuple(range(1, score + 1)) or None
    return Sequence(EngineRequest(f"{task}-{number}", task, (1,) * prompt, score_token_ids=scored), arrival_s=0.0)


def ids(plan: StepPlan) -> list[str]:
    """The sequences that begin, in the order of their admission."""
    return [c.sequence.request.id for c in plan.prefill if c.begins_prefill]


def advance(scheduler: Scheduler, plan: StepPlan) -> None:
    """What the engine does after a step, with every sampled token the same."""
    scheduler.advance(plan)
    for sequence in plan.sequences:
        if sequence.status is Status.RUNNING and not sequence.scoring:
            sequence.token_ids.append(1)


def test_scheduling_imports_no_torch() -> None:
    code = "import server.engine.scheduler, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tasks_take_turns_in_leaving_the_queue() -> None:
    scheduler = Scheduler(EngineConfig(max_batch=6, max_context=64))
    for number in range(5):
        scheduler.add(make("busy", number))
    for number in range(2):
        scheduler.add(make("other", number))
    scheduler.add(make("third", 0))
    assert ids(scheduler.schedule()) == ["busy-0", "other-0", "third-0", "busy-1", "other-1", "busy-2"]
    scheduler.check_integrity()


def test_within_a_task_first_come_is_first_served() -> None:
    scheduler = Scheduler(EngineConfig(max_batch=8, max_context=64))
    for number in range(4):
        scheduler.add(make("t", number))
    assert ids(scheduler.schedule()) == ["t-0", "t-1", "t-2", "t-3"]


def test_a_freed_slot_goes_to_the_task_whose_turn_it_is() -> None:
    scheduler = Scheduler(EngineConfig(max_batch=1, max_context=64))
    for number in range(3):
        scheduler.add(make("busy", number))
    first = scheduler.schedule().prefill[0].sequence
    scheduler.add(make("other", 0))
    admitted = []
    for _ in range(3):
        scheduler.remove(first)
        first = scheduler.schedule().prefill[0].sequence
        admitted.append(first.request.id)
    assert admitted == ["busy-1", "other-0", "busy-2"]


def test_every_running_sequence_decodes_while_a_long_prompt_is_computed_in_chunks() -> None:
    scheduler = Scheduler(EngineConfig(max_batch=4, max_context=128, prefill_chunk=8))
    scheduler.add(make("short", 0, prompt=3))
    plan = scheduler.schedule()
    advance(scheduler, plan)
    scheduler.add(make("long", 0, prompt=20))
    chunks = []
    for _ in range(3):
        plan = scheduler.schedule()
        assert [s.request.id for s in plan.decode] == ["short-0"]
        chunks += [(c.start, c.stop, c.completes_prefill) for c in plan.prefill]
        advance(scheduler, plan)
    assert chunks == [(0, 8, False), (8, 16, False), (16, 20, True)]
    assert len(scheduler.schedule().decode) == 2


def test_short_prompts_pass_a_long_one_that_still_moves_on() -> None:
    scheduler = Scheduler(EngineConfig(max_batch=4, max_context=1024, prefill_chunk=16, busy_prefill_chunk=None))
    scheduler.add(make("long", 0, prompt=500))
    for number in range(2):
        scheduler.add(make("short", number, prompt=4))
    plan = scheduler.schedule()
    assert {c.sequence.request.id: c.stop for c in plan.prefill} == {"long-0": 8, "short-0": 4, "short-1": 4}
    advance(scheduler, plan)
    plan = scheduler.schedule()
    assert [(c.start, c.stop) for c in plan.prefill] == [(8, 24)]


def running(scheduler: Scheduler, count: int) -> None:
    """Bring so many sequences to decoding."""
    for number in range(count):
        scheduler.add(make("running", number, prompt=1))
        advance(scheduler, scheduler.schedule())


def test_prompts_compute_little_at_once_beside_sequences_that_decode() -> None:
    scheduler = Scheduler(EngineConfig(max_batch=16, max_context=2048, prefill_chunk=256))
    running(scheduler, 8)
    scheduler.add(make("long", 0, prompt=1500))
    plan = scheduler.schedule()
    assert (len(plan.decode), plan.num_prefill_tokens) == (8, 20 + 8)


def test_prompts_compute_less_the_more_they_attend_to() -> None:
    scheduler = Scheduler(EngineConfig(max_batch=16, max_context=2048, prefill_chunk=256))
    running(scheduler, 8)
    scheduler.add(make("long", 0, prompt=1500))
    tokens = []
    while (plan := scheduler.schedule()).prefill:
        tokens.append(plan.num_prefill_tokens)
        advance(scheduler, plan)
    assert sum(tokens) == 1500
    assert tokens[:-1] == sorted(tokens[:-1], reverse=True)
    assert tokens[-2] == round(28 / (1 + (1500 - tokens[-1] - tokens[-2]) / 500))


def test_prompts_compute_all_they_may_while_they_are_the_majority() -> None:
    scheduler = Scheduler(EngineConfig(max_batch=16, max_context=2048, prefill_chunk=256))
    running(scheduler, 3)
    for number in range(3):
        scheduler.add(make("long", number, prompt=1500))
    assert scheduler.schedule().num_prefill_tokens == 20 + 3 + 12 * 2
    scheduler.add(make("long", 3, prompt=1500))
    assert scheduler.schedule().num_prefill_tokens == 256


def test_where_prompts_cost_decoding_little_they_always_compute_all_they_may() -> None:
    scheduler = Scheduler(EngineConfig(max_batch=16, max_context=2048, prefill_chunk=256, busy_prefill_chunk=None))
    running(scheduler, 3)
    scheduler.add(make("long", 0, prompt=1500))
    assert scheduler.schedule().num_prefill_tokens == 256


def test_a_budget_of_one_token_still_computes_everything() -> None:
    scheduler = Scheduler(EngineConfig(max_batch=2, max_context=64, prefill_chunk=1))
    sequences = [make("t", n, prompt=3) for n in range(2)]
    for sequence in sequences:
        scheduler.add(sequence)
    for _ in range(6):
        plan = scheduler.schedule()
        assert plan.num_prefill_tokens == 1
        advance(scheduler, plan)
    assert all(s.status is Status.RUNNING for s in sequences)


def test_the_last_scored_token_is_never_computed() -> None:
    scheduler = Scheduler(EngineConfig(max_batch=2, max_context=64, prefill_chunk=4))
    scheduler.add(make("t", 0, prompt=3, score=4))
    targets = []
    for _ in range(2):
        plan = scheduler.schedule()
        targets.append(plan.prefill[0].score_targets)
        advance(scheduler, plan)
    assert targets == [[1, 2], [3, 4]]
    assert plan.prefill[0].completes_prefill


def test_a_full_queue_refuses_also_for_those_on_their_way() -> None:
    scheduler = Scheduler(EngineConfig(max_batch=1, max_context=64, max_queue=2))
    scheduler.add(make("t", 0))
    scheduler.check_room()
    with pytest.raises(QueueFull, match="2 requests wait already"):
        scheduler.check_room(more=1)
    scheduler.add(make("t", 1))
    with pytest.raises(QueueFull):
        scheduler.add(make("t", 2))
    scheduler.check_integrity()


def test_removing_a_waiting_sequence_takes_its_task_out_of_the_turn() -> None:
    scheduler = Scheduler(EngineConfig(max_batch=1, max_context=64))
    for task in ("a", "b", "c"):
        scheduler.add(make(task, 0))
    found = scheduler.find("b-0")
    assert found is not None
    scheduler.remove(found)
    scheduler.check_integrity()
    assert scheduler.find("b-0") is None
    assert ids(scheduler.schedule()) == ["a-0"]


@given(st.data())
def test_any_traffic_comes_to_an_end_with_every_token_computed_once(data: st.DataObject) -> None:
    config = EngineConfig(
        max_batch=data.draw(st.integers(1, 4)), max_context=64, prefill_chunk=data.draw(st.integers(1, 9))
    )
    scheduler = Scheduler(config)
    jobs = data.draw(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 12), st.integers(0, 3)), max_size=12))
    lifetimes = data.draw(st.lists(st.integers(1, 5), min_size=len(jobs), max_size=len(jobs)))
    left = {}
    for number, ((task, prompt, score), lifetime) in enumerate(zip(jobs, lifetimes, strict=True)):
        sequence = make(task, number, prompt, score)
        scheduler.add(sequence)
        left[sequence.request.id] = lifetime
    for _ in range(400):
        if not scheduler.has_work:
            break
        plan = scheduler.schedule()
        assert plan.sequences, "work is left but nothing is scheduled"
        assert plan.num_prefill_tokens <= config.prefill_chunk
        for chunk in plan.prefill:
            assert chunk.start == chunk.sequence.num_computed_tokens < chunk.stop
        advance(scheduler, plan)
        for sequence in plan.sequences:
            if sequence.status is not Status.RUNNING:
                continue
            left[sequence.request.id] -= 1
            if sequence.scoring or left[sequence.request.id] <= 0:
                scheduler.remove(sequence)
        scheduler.check_integrity()
    assert not scheduler.has_work
