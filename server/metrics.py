"""Every metric of the server, in a registry of its own. The one module that knows Prometheus.

Other modules hand over plain facts (an engine step, a finished request, the cache's counts, the jobs).
"""

from __future__ import annotations

import threading
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from server.adapters.cache import CacheStats
    from server.engine.config import StepStats
    from server.engine.merged import MergedStats

# Creation times would double the number of series.
disable_created_metrics()  # type: ignore[no-untyped-call]

CONTENT_TYPE = CONTENT_TYPE_LATEST
OTHER = "other"
NO_TASK = "none"
# A task that is not labelled takes the place of the least busy one once it is this many times as busy.
_OVERTAKE = 2.0

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_GAP = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_ASSEMBLY = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_BATCH = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)
_JOB = (1, 5, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200)


class Metrics:
    """All metrics, with one method per kind of fact. Thread-safe."""

    def __init__(self, max_tasks: int = 50) -> None:
        self.registry = registry = CollectorRegistry()
        self._labels = TaskLabels(max_tasks, self._forget_task)

        def counter(name: str, text: str, labels: Iterable[str] = ()) -> Counter:
            return Counter(f"mhr_{name}", text, tuple(labels), registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], labels: Iterable[str] = ()) -> Histogram:
            return Histogram(f"mhr_{name}", text, tuple(labels), buckets=buckets, registry=registry)

        def gauge(name: str, text: str, labels: Iterable[str] = ()) -> Gauge:
            return Gauge(f"mhr_{name}", text, tuple(labels), registry=registry)

        self._requests = counter("requests", "HTTP requests by outcome", ("route", "task", "outcome"))
        self._duration = histogram("request_duration_seconds", "Duration of HTTP requests", _LATENCY, ("route",))
        self._ttft = histogram("time_to_first_token_seconds", "From a sequence's arrival to its first token", _LATENCY)
        self._gap = histogram("inter_token_latency_seconds", "Between two tokens of one sequence", _TOKEN_GAP)
        self._queue_wait = histogram("queue_wait_seconds", "From a sequence's arrival to its first step", _LATENCY)
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens", ("task",))
        self._generated_tokens = counter("generated_tokens", "Generated tokens", ("task",))
        self._running = gauge("requests_running", "Sequences in the engine's batch")
        self._waiting = gauge("requests_waiting", "Sequences waiting for a place in the batch")
        self._batch_size = histogram("batch_size", "Sequences decoded in one step", _BATCH)
        self._batch_tasks = histogram("batch_distinct_tasks", "Tasks in one step", _BATCH)
        self._steps = counter("steps", "Engine steps by the way adapters were computed", ("path",))
        self._assembly = histogram("adapter_assembly_seconds", "Making an adapter from the store", _ASSEMBLY, ("kind",))
        self._prefix_tokens = counter("prefix_cache_tokens", "Prompt tokens reused and computed", ("result",))
        self._prefix_bytes = gauge("prefix_cache_bytes", "Bytes of prompt prefixes kept")
        self._rejections = counter("rejections", "Requests refused", ("reason",))
        self._cancelled = counter("cancelled", "Requests that ended before their answer", ("reason",))
        self._jobs = gauge("adapt_jobs", "Adaptation jobs in the catalog", ("status",))
        self._job_duration = histogram("adapt_job_duration_seconds", "From start to end of a job", _JOB, ("method",))
        self._job_steps = counter("adapt_steps", "Training steps done by adaptation jobs")
        self._build_info = gauge("build_info", "Always 1", ("version", "backbone", "device", "dtype"))

    def render(self) -> bytes:
        """The exposition in Prometheus' text format."""
        return generate_latest(self.registry)

    def build_info(self, *, version: str, backbone: str, device: str, dtype: str) -> None:
        self._build_info.labels(version, backbone, device, dtype).set(1)

    def http_request(self, *, route: str, task: str | None, outcome: str, seconds: float) -> None:
        self._requests.labels(route, self._label(task), outcome).inc()
        self._duration.labels(route).observe(seconds)

    def sequence(self, *, task: str, prompt_tokens: int, generated_tokens: int, queue_s: float | None) -> None:
        """One sequence left the engine."""
        label = self._label(task)
        self._prompt_tokens.labels(label).inc(prompt_tokens)
        self._generated_tokens.labels(label).inc(generated_tokens)
        if queue_s is not None:
            self._queue_wait.observe(queue_s)

    def first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def next_token(self, seconds: float) -> None:
        self._gap.observe(seconds)

    def step(self, stats: StepStats) -> None:
        """One engine step."""
        self._steps.labels(stats.path).inc()
        self._prefix_tokens.labels("hit").inc(stats.reused_tokens)
        self._prefix_tokens.labels("miss").inc(stats.prefill_tokens)
        if stats.decode_rows:
            self._batch_size.observe(stats.decode_rows)
        self._batch_tasks.observe(stats.distinct_tasks)

    def assembly(self, kind: str, seconds: float) -> None:
        self._assembly.labels(kind).observe(seconds)

    def rejected(self, reason: str) -> None:
        self._rejections.labels(reason).inc()

    def cancelled(self, reason: str) -> None:
        self._cancelled.labels(reason).inc()

    def jobs(self, counts: Mapping[str, int]) -> None:
        """Jobs by status, as the catalog has them now."""
        for status in ("queued", "running", "succeeded", "failed", "cancelled"):
            self._jobs.labels(status).set(counts.get(status, 0))

    def job_steps(self, steps: int) -> None:
        self._job_steps.inc(steps)

    def job_finished(self, method: str, seconds: float) -> None:
        self._job_duration.labels(method).observe(seconds)

    def watch_engine(
        self, running: Callable[[], int], waiting: Callable[[], int], prefix_bytes: Callable[[], int]
    ) -> None:
        """Read the engine's own counts at every scrape."""
        self._running.set_function(running)
        self._waiting.set_function(waiting)
        self._prefix_bytes.set_function(prefix_bytes)

    def watch_adapter_cache(self, assembled: Callable[[], CacheStats], merged: Callable[[], MergedStats]) -> None:
        """Read the counts of the adapter cache and of the engine's merged copies at every scrape."""
        self.registry.register(_CacheCollector(assembled, merged))

    def _label(self, task: str | None) -> str:
        return NO_TASK if task is None else self._labels.label(task)

    def _forget_task(self, task: str) -> None:
        for metric in (self._prompt_tokens, self._generated_tokens):
            metric.remove_by_labels({"task": task})
        self._requests.remove_by_labels({"task": task})


class TaskLabels:
    """The bounded `task` label: the busiest `limit` tasks keep their names, the rest are `other`.

    A task that overtakes takes the least busy one's place, and `forget` is called with the loser, whose
    series end there. Counts never move between series, so that rates stay true.
    """

    def __init__(self, limit: int, forget: Callable[[str], None]) -> None:
        self._limit = limit
        self._forget = forget
        self._lock = threading.Lock()
        self._named: Tally[str] = Tally()
        self._others: Tally[str] = Tally()

    def label(self, task: str) -> str:
        """Count one more use of `task` and return its label."""
        with self._lock:
            if task in self._named or len(self._named) < self._limit:
                self._named[task] += 1
                return task
            self._others[task] += 1
            least = min(self._named, key=self._named.__getitem__)
            if self._others[task] <= _OVERTAKE * self._named[least]:
                self._bound_others()
                return OTHER
            self._named[task] = self._others.pop(task)
            self._others[least] = self._named.pop(least)
        self._forget(least)
        return task

    def _bound_others(self) -> None:
        """Forget the rare half of a long tail, so that a million tasks cost no memory."""
        if len(self._others) > 100 * self._limit:
            self._others = Tally(dict(self._others.most_common(50 * self._limit)))


class _CacheCollector(Collector):
    def __init__(self, assembled: Callable[[], CacheStats], merged: Callable[[], MergedStats]) -> None:
        self._assembled = assembled
        self._merged = merged

    def collect(self) -> Iterable[Metric]:
        assembled, merged = self._assembled(), self._merged()
        lookups = CounterMetricFamily(
            "mhr_adapter_cache_lookups", "Lookups of assembled adapters", labels=("tier", "result")
        )
        for result, count in (("hit", assembled.hits), ("miss", assembled.misses), ("joined", assembled.joined)):
            lookups.add_metric(("assembled", result), count)
        yield lookups
        entries = GaugeMetricFamily("mhr_adapter_cache_entries", "Adapters held", labels=("tier",))
        size = GaugeMetricFamily("mhr_adapter_cache_bytes", "Bytes of adapters held", labels=("tier",))
        for tier, held in (("assembled", assembled), ("merged", merged)):
            entries.add_metric((tier,), held.entries)
            size.add_metric((tier,), held.bytes)
        yield entries
        yield size
        evictions = CounterMetricFamily("mhr_adapter_evictions", "Adapters let go", labels=("tier", "reason"))
        for reason in ("budget", "too_large"):
            evictions.add_metric(("assembled", reason), assembled.evictions.get(reason, 0))
        evictions.add_metric(("merged", "budget"), merged.evictions)
        yield evictions
