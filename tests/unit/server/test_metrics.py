from __future__ import annotations

from collections import Counter

from server.adapters.cache import AdapterCache
from server.engine.config import StepStats
from server.engine.merged import MergedStats
from server.metrics import OTHER, Metrics, TaskLabels

DESIGNED = {
    "mhr_requests_total",
    "mhr_request_duration_seconds",
    "mhr_time_to_first_token_seconds",
    "mhr_inter_token_latency_seconds",
    "mhr_queue_wait_seconds",
    "mhr_prompt_tokens_total",
    "mhr_generated_tokens_total",
    "mhr_requests_running",
    "mhr_requests_waiting",
    "mhr_batch_size",
    "mhr_batch_distinct_tasks",
    "mhr_steps_total",
    "mhr_adapter_cache_lookups_total",
    "mhr_adapter_cache_entries",
    "mhr_adapter_cache_bytes",
    "mhr_adapter_evictions_total",
    "mhr_adapter_assembly_seconds",
    "mhr_prefix_cache_tokens_total",
    "mhr_prefix_cache_bytes",
    "mhr_rejections_total",
    "mhr_cancelled_total",
    "mhr_adapt_jobs",
    "mhr_adapt_job_duration_seconds",
    "mhr_adapt_steps_total",
    "mhr_build_info",
}


def test_the_names_are_the_designed_ones() -> None:
    metrics = Metrics()
    metrics.watch_adapter_cache(AdapterCache(0).stats, lambda: MergedStats(entries=0, bytes=0, evictions=0))
    names = {line.split()[2] for line in metrics.render().decode().splitlines() if line.startswith("# HELP")}
    assert names == DESIGNED


def test_the_engines_counts_are_read_at_every_scrape() -> None:
    metrics = Metrics()
    counts = {"running": 4, "waiting": 5, "prefix_bytes": 6}
    metrics.watch_engine(lambda: counts["running"], lambda: counts["waiting"], lambda: counts["prefix_bytes"])
    lines = metrics.render().decode().splitlines()
    assert {"mhr_requests_running 4.0", "mhr_requests_waiting 5.0", "mhr_prefix_cache_bytes 6.0"} <= set(lines)
    counts["running"] = 0
    assert "mhr_requests_running 0.0" in metrics.render().decode().splitlines()


def test_a_step_moves_its_metrics() -> None:
    metrics = Metrics()
    metrics.step(
        StepStats(
            path="slots",
            decode_rows=3,
            prefill_tokens=20,
            reused_tokens=30,
            generated_tokens=4,
            distinct_tasks=2,
            seconds=0.1,
        )
    )
    lines = metrics.render().decode().splitlines()
    for line in (
        'mhr_steps_total{path="slots"} 1.0',
        "mhr_batch_size_sum 3.0",
        "mhr_batch_distinct_tasks_sum 2.0",
        'mhr_prefix_cache_tokens_total{result="miss"} 20.0',
        'mhr_prefix_cache_tokens_total{result="hit"} 30.0',
    ):
        assert line in lines


def test_the_busiest_tasks_have_names_and_the_rest_are_other() -> None:
    forgotten: list[str] = []
    labels = TaskLabels(2, forgotten.append)
    for _ in range(10):
        labels.label("a")
    for _ in range(3):
        labels.label("b")
    seen = Counter(labels.label("c") for _ in range(10))
    assert seen == {OTHER: 6, "c": 4}  # c overtakes b once it is more than twice as busy
    assert forgotten == ["b"]
    assert [labels.label(task) for task in ("a", "b", "d")] == ["a", OTHER, OTHER]


def test_a_task_that_loses_its_name_loses_its_series() -> None:
    metrics = Metrics(max_tasks=1)
    metrics.sequence(task="a", prompt_tokens=1, generated_tokens=1, queue_s=None)
    for _ in range(4):
        metrics.sequence(task="b", prompt_tokens=1, generated_tokens=1, queue_s=0.5)
    text = metrics.render().decode()
    assert 'mhr_prompt_tokens_total{task="a"}' not in text
    assert 'mhr_prompt_tokens_total{task="b"} 2.0' in text
    assert 'mhr_prompt_tokens_total{task="other"} 2.0' in text


def test_many_rare_tasks_make_few_series() -> None:
    metrics = Metrics(max_tasks=5)
    for number in range(5000):
        metrics.http_request(route="/generate", task=f"task-{number}", outcome="ok", seconds=0.1)
    text = metrics.render().decode()
    assert text.count("mhr_requests_total{") == 6
    assert len(metrics._labels._others) <= 500
