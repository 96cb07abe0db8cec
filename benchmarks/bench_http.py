"""A closed loop over HTTP: so many users, each sending its next request when the last one is answered.

Every request goes to a task drawn uniformly from those that the server lists (`base` when it has none), with an
input of random words, and generates a fixed number of tokens. Without --url a server is started for the run, on
a free port and without the adaptation worker. The users share the machine with the server.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import httpx
from common import ROOT, conditions, print_json, print_table

WORDS = ("the", "old", "lamp", "broke", "after", "two", "days", "and", "my", "order", "never", "came", "please", "pay")
READY_TIMEOUT_S = 180.0


def main() -> None:
    options = parse_options()
    about = conditions()
    if options.url:
        results = asyncio.run(measure(options.url, options))
    else:
        with own_server(options) as url:
            results = asyncio.run(measure(url, options))
    header = (
        "users",
        "prompt tokens",
        "requests/s",
        "tokens/s",
        "spread",
        "p50 s",
        "p95 s",
        "p99 s",
        "ttft p50 ms",
        "ttft p95 ms",
        "errors",
    )
    print_table(
        f"{results['tasks']} tasks, {options.prompt_words} words in beside the instruction, "
        f"{options.new_tokens} tokens out",
        header,
        [tuple(level.values()) for level in results["levels"]],
    )
    print_json({"benchmark": "http", "conditions": about, "options": printable(options), "results": results})


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server; one is started if this is not given")
    parser.add_argument("--data-dir", type=Path, default=Path(gettempdir()) / "mhr-benchmarks", help="of that server")
    parser.add_argument("--users", type=int, nargs="+", default=[1, 16, 32], help="levels of concurrency")
    parser.add_argument("--prompt-words", type=int, default=30)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--warmup-s", type=float, default=20.0)
    parser.add_argument("--window-s", type=float, default=30.0)
    parser.add_argument("--repeats", type=int, default=3, help="windows at every level")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def printable(options: argparse.Namespace) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}


@contextmanager
def own_server(options: argparse.Namespace) -> Iterator[str]:
    """Start a server and stop it afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"MHR_PORT": str(port), "MHR_DATA_DIR": str(options.data_dir), "MHR_WORKER": "false"}
    server = subprocess.Popen(
        [sys.executable, "-m", "server", "serve", "--log-level", "warning"], cwd=ROOT, env=os.environ | settings
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(url, server)
        yield url
    finally:
        server.terminate()
        server.wait(60)


def wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with status {server.returncode}")
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"the server was not ready within {READY_TIMEOUT_S:.0f} s")


@dataclass(frozen=True)
class Answered:
    """One answer, or one refusal (tokens = 0)."""

    at_s: float  # since the users began
    tokens: int
    prompt_tokens: int = 0
    latency_s: float = 0.0
    ttft_ms: float = 0.0


async def measure(url: str, options: argparse.Namespace) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        tasks = await list_tasks(client)
        levels = []
        for users in options.users:
            answers = await run_users(client, tasks, users, options)
            levels.append(summary(users, answers, options))
            print(f"{users} users: {levels[-1]['tokens_per_s']:.1f} tokens/s", file=sys.stderr)
    return {"tasks": len(tasks), "levels": levels}


async def list_tasks(client: httpx.AsyncClient) -> list[str]:
    tasks: list[str] = []
    cursor: dict[str, str] = {}
    while True:
        page = (await client.get("/tasks", params={"limit": "100", **cursor})).raise_for_status().json()
        tasks += [task["id"] for task in page["data"]]
        if page["next_cursor"] is None:
            return tasks or ["base"]
        cursor = {"cursor": page["next_cursor"]}


async def run_users(
    client: httpx.AsyncClient, tasks: list[str], users: int, options: argparse.Namespace
) -> list[Answered]:
    """All users at work from the warm-up to the last window's end, without a pause between windows."""
    answers: list[Answered] = []
    start_s = time.perf_counter()
    end_s = options.warmup_s + options.repeats * options.window_s

    async def user(number: int) -> None:
        draw = random.Random(options.seed * 1000 + number)
        while time.perf_counter() - start_s < end_s:
            text = " ".join(draw.choices(WORDS, k=options.prompt_words))
            answers.append(await ask(client, draw.choice(tasks), text, options.new_tokens, start_s))

    await asyncio.gather(*(user(number) for number in range(users)))
    return answers


async def ask(client: httpx.AsyncClient, task: str, text: str, new_tokens: int, start_s: float) -> Answered:
    parameters = {"max_new_tokens": new_tokens, "ignore_eos": True}
    sent_s = time.perf_counter()
    try:
        answer = await client.post("/generate", json={"task_id": task, "inputs": text, "parameters": parameters})
        answer.raise_for_status()
    except httpx.HTTPError:
        await asyncio.sleep(0.1)  # a server that refuses at once must not be asked in a tight loop
        return Answered(time.perf_counter() - start_s, tokens=0)
    now_s = time.perf_counter()
    body = answer.json()
    usage, ttft_ms = body["usage"], body["timing"]["ttft_ms"]
    return Answered(now_s - start_s, usage["completion_tokens"], usage["prompt_tokens"], now_s - sent_s, ttft_ms)


def summary(users: int, answers: list[Answered], options: argparse.Namespace) -> dict[str, Any]:
    """Figures of the windows; what came before or after them does not count."""
    end_s = options.warmup_s + options.repeats * options.window_s
    counted = [a for a in answers if options.warmup_s <= a.at_s < end_s]
    good = [a for a in counted if a.tokens]
    if not good:
        raise SystemExit(f"with {users} users no request was answered within the windows")
    tokens, requests = [0] * options.repeats, [0] * options.repeats
    for answer in good:
        window = int((answer.at_s - options.warmup_s) / options.window_s)
        tokens[window] += answer.tokens
        requests[window] += 1
    speed = statistics.median(tokens) / options.window_s
    return {
        "users": users,
        "prompt_tokens_mean": statistics.mean(a.prompt_tokens for a in good),
        "requests_per_s": statistics.median(requests) / options.window_s,
        "tokens_per_s": speed,
        "spread": (max(tokens) - min(tokens)) / options.window_s / speed if speed else 0.0,
        "latency_p50_s": percentile([a.latency_s for a in good], 50),
        "latency_p95_s": percentile([a.latency_s for a in good], 95),
        "latency_p99_s": percentile([a.latency_s for a in good], 99),
        "ttft_p50_ms": percentile([a.ttft_ms for a in good], 50),
        "ttft_p95_ms": percentile([a.ttft_ms for a in good], 95),
        "errors": len(counted) - len(good),
    }


def percentile(values: list[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


if __name__ == "__main__":
    main()
