"""The scenarios about waiting: a cold task, a long prompt beside streams, a job beside streams, memory of tasks."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import print_table

from serving.client import Answer, send
from serving.house import House
from serving.process import ServerProcess, cpu_seconds, resident_bytes
from serving.scenarios import NO_LIMIT, Result, suffix
from serving.targets import generate
from serving.waves import gaps, percentile, print_ratios, ratio_of

JOB_START_TIMEOUT_S = 120.0
JOB_ALONE_S = 30.0  # steps may take seconds each


def cold(house: House) -> Result:
    """First token of a task never asked before, against its second request."""
    results: Result = {}
    for q in house.options.quantization:
        count = 4 * house.options.repeats
        server = house.start_ours(count + 1, {"MHR_QUANTIZATION": q, **dict([NO_LIMIT])})
        first_token_s(house, server, count)  # the inventory itself is read and stacked once
        pairs = [(first_token_s(house, server, n), first_token_s(house, server, n)) for n in range(count)]
        cold_s, warm_s = ([pair[place] for pair in pairs] for place in (0, 1))
        extra_s = [a - b for a, b in pairs]
        results[f"cold{suffix(q)}"] = {
            "cold_ms": 1000 * statistics.median(cold_s),
            "warm_ms": 1000 * statistics.median(warm_s),
            "extra_ms": 1000 * statistics.median(extra_s),
            "extra_p95_ms": 1000 * percentile(extra_s, 95),
        }
    print_table(
        f"First token of {house.options.prompt_tokens} in, one request at a time; target: at most 30 ms more",
        ("server", "cold task ms", "warm ms", "median of differences ms", "p95 ms"),
        [(name, *figures.values()) for name, figures in results.items()],
    )
    return results


def first_token_s(house: House, server: ServerProcess, task: int) -> float:
    (answer,) = send(server.url, [generate(task, house.prompts(1)[0].text, 1)], clients=1)
    return answer.done_s - answer.sent_s


def long_prompt(house: House) -> Result:
    """p95 time between the tokens of running streams while a long prompt is computed, against before it came."""
    options, results = house.options, {}
    for q in options.quantization:
        server = house.start_ours(options.streams + 1, {"MHR_QUANTIZATION": q})
        before_s, during_s = [], []
        for number in range(options.warmup + options.repeats):
            before, during = gaps_around_arrival(house, server)
            print(f"wave {number}: p95 {before:.3f} s before, {during:.3f} s during", file=sys.stderr)
            if number >= options.warmup:
                before_s.append(before)
                during_s.append(during)
        name = f"{options.long_tokens} prompt tokens beside {options.streams} streams{suffix(q)}"
        results[name] = ratio_of(during_s, before_s) | {
            "at_most": 2.0,
            "before_p95_s": statistics.median(before_s),
            "during_p95_s": statistics.median(during_s),
        }
    print_ratios(results)
    return results


def gaps_around_arrival(house: House, server: ServerProcess) -> tuple[float, float]:
    """p95 of the time between tokens: while the streams are alone, and while the long prompt is computed."""
    options = house.options
    streams = [
        generate(n, prompt.text, options.stream_tokens, stream=True)
        for n, prompt in enumerate(house.prompts(options.streams))
    ]
    (prompt,) = house.prompts(1, options.long_tokens)
    long = generate(options.streams, prompt.text, 1, stream=True)
    long = dataclasses.replace(long, after_tokens=options.arrival_tokens)
    *running, arrived = send(server.url, [*streams, long])
    all_run_s = max(answer.token_s[0] for answer in running)
    last_s = min(answer.token_s[-1] for answer in running)
    if not all_run_s < arrived.sent_s < arrived.token_s[0] < last_s:
        raise SystemExit("the streams did not run all the while; give them more with --stream-tokens")
    before = gaps_between(running, all_run_s, arrived.sent_s)
    during = gaps_between(running, arrived.sent_s, arrived.token_s[0])
    return percentile(before, 95), percentile(during, 95)


def gaps_between(answers: Sequence[Answer], start_s: float, end_s: float) -> list[float]:
    """The time between tokens of streams, of the tokens that came within a span."""
    return [gap for a in answers for gap in gaps([at for at in a.token_s if start_s <= at <= end_s])]


def training(house: House) -> Result:
    """p95 time between the tokens of streams while a job trains, against idle; and how fast the job goes meanwhile."""
    options, results = house.options, {}
    for q in options.quantization:
        server = house.start_ours(options.streams, {"MHR_QUANTIZATION": q, "MHR_WORKER": "true"})
        idle_s, busy_s, rates = [], [], []
        finish_job(server, start_job(server))  # the worker loads its backbone at the first job
        for number in range(options.repeats):
            idle_s.append(stream_p95(house, server))
            job = start_job(server)
            first, start_s = step_of(server, job), time.monotonic()
            busy_s.append(stream_p95(house, server))
            rates.append((step_of(server, job) - first) / (time.monotonic() - start_s))
            alone = step_rate(server, job) if number == options.repeats - 1 else None
            finish_job(server, job)
            print(f"wave {number}: p95 {idle_s[-1]:.3f} s idle, {busy_s[-1]:.3f} s with a job", file=sys.stderr)
        name = f"{options.streams} streams while a job trains{suffix(q)}"
        results[name] = ratio_of(busy_s, idle_s) | {
            "at_most": 1.5,
            "idle_p95_s": statistics.median(idle_s),
            "busy_p95_s": statistics.median(busy_s),
            "job_steps_per_s": statistics.median(rates),
            "job_steps_per_s_alone": alone,
        }
    print_ratios(results)
    print_table(
        "The job",
        ("beside", "steps/s meanwhile", "steps/s alone"),
        [(name, r["job_steps_per_s"], r["job_steps_per_s_alone"]) for name, r in results.items()],
    )
    return results


def stream_p95(house: House, server: ServerProcess) -> float:
    options = house.options
    prompts = house.prompts(options.streams)
    requests = [generate(n, p.text, options.new_tokens, stream=True) for n, p in enumerate(prompts)]
    answers = send(server.url, requests, clients=options.streams)
    all_run_s = max(answer.token_s[0] for answer in answers)
    return percentile(gaps_between(answers, all_run_s, answers[0].done_s), 95)


def start_job(server: ServerProcess) -> str:
    """A job of very many steps, when it has made its first ones."""
    examples = [{"input": f"Which number comes after {n}?", "output": str(n + 1)} for n in range(32)]
    job = call(
        server,
        "/adapt",
        {
            "task_id": "learned",
            "instruction": "Answer the question about numbers with a number.",
            "examples": examples,
            "method": "mhr",
            "promote": "never",
            "hyperparameters": {"steps": 10_000, "evaluate_every": 10_000, "rest": 0},
        },
    )
    deadline_s = time.monotonic() + JOB_START_TIMEOUT_S
    while step_of(server, job["id"]) < 2:
        if time.monotonic() > deadline_s:
            raise SystemExit(f"the job {job['id']} made no step within {JOB_START_TIMEOUT_S:.0f} s")
        time.sleep(0.2)
    return str(job["id"])


def step_of(server: ServerProcess, job: str) -> int:
    """Steps that the job has made."""
    events = call(server, f"/jobs/{job}/events")["data"]
    return max((event["data"]["step"] for event in events if event["type"] == "step"), default=0)


def step_rate(server: ServerProcess, job: str) -> float:
    """Steps per second of a job that has the machine to itself."""
    first, start_s = step_of(server, job), time.monotonic()
    time.sleep(JOB_ALONE_S)
    return (step_of(server, job) - first) / (time.monotonic() - start_s)


def finish_job(server: ServerProcess, job: str) -> None:
    call(server, f"/jobs/{job}/cancel", {})
    while call(server, f"/jobs/{job}")["status"] != "cancelled":
        time.sleep(0.1)


def call(server: ServerProcess, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """A call that is not measured: POST with a body, GET without."""
    request = urllib.request.Request(
        server.url + path,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def memory(house: House) -> Result:
    """Bytes in memory and on disk for each registered task, from servers with few and with very many."""
    options = house.options
    sizes = [options.registered[0], options.registered[-1]]
    figures = {}
    for count in sizes:
        start_s = time.monotonic()
        data_dir = house.data_dir(count)
        server = house.serve(data_dir, {})
        ready_s = time.monotonic() - start_s
        prompts = house.prompts(options.clients)
        spread = [number * count // options.clients for number in range(options.clients)]
        before_s = cpu_seconds(server.pid)
        send(server.url, [generate(task, p.text, 4) for task, p in zip(spread, prompts, strict=True)], options.clients)
        figures[count] = {
            "resident_bytes": resident_bytes(server.pid),
            "disk_bytes": disk_bytes(data_dir),
            "prepared_and_ready_s": ready_s,
            "cpu_s_of_a_burst": cpu_seconds(server.pid) - before_s,
        }
        server.stop()
    few, most = sizes
    each = {
        f"{where}_bytes_per_task": (figures[most][f"{where}_bytes"] - figures[few][f"{where}_bytes"]) / (most - few)
        for where in ("resident", "disk")
    }
    print_table(
        "Memory of registered routing tasks; target: at most 60 kB each",
        ("registered", "resident MiB", "on disk MiB", "prepared and ready s", "processor s of a burst"),
        [(n, f["resident_bytes"] / 2**20, f["disk_bytes"] / 2**20, *list(f.values())[2:]) for n, f in figures.items()],
    )
    in_memory, on_disk = each.values()
    print(f"\neach task: {in_memory:.0f} bytes in memory, {on_disk:.0f} on disk")
    return each | {str(count): figure for count, figure in figures.items()}


def disk_bytes(folder: Path) -> int:
    """What a data directory holds of its own, symbolic links left out."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
