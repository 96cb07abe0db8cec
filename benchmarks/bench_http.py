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
from dataclasses import dataclass, field
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
    parser.add_argument("--warmup-s", type=float, default=10.0)
    parser.add_argument("--window-s", type=float, default=20.0)
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


@dataclass
class Window:
    """What was answered within one stretch of time."""

    seconds: float = 0.0
    tokens: int = 0
    errors: int = 0
    latencies_s: list[float] = field(default_factory=list)
    ttfts_ms: list[float] = field(default_factory=list)


async def measure(url: str, options: argparse.Namespace) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        tasks = await list_tasks(client)
        levels = []
        for users in options.users:
            await run_window(client, tasks, users, options.warmup_s, options, seed=-1)
            windows = [
                await run_window(client, tasks, users, options.window_s, options, seed=options.seed + number)
                for number in range(options.repeats)
            ]
            levels.append(summary(users, windows))
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


async def run_window(
    client: httpx.AsyncClient, tasks: list[str], users: int, seconds: float, options: argparse.Namespace, *, seed: int
) -> Window:
    """All users at work for about `seconds`; requests under way at the end are waited for and counted."""
    window = Window()
    start_s = time.perf_counter()

    async def user(number: int) -> None:
        draw = random.Random(seed * 1000 + number)
        while time.perf_counter() - start_s < seconds:
            await ask(
                client, draw.choice(tasks), " ".join(draw.choices(WORDS, k=options.prompt_words)), options, window
            )

    await asyncio.gather(*(user(number) for number in range(users)))
    window.seconds = time.perf_counter() - start_s
    print(f"{users} users: {len(window.latencies_s)} answers in {window.seconds:.1f} s", file=sys.stderr)
    return window


async def ask(client: httpx.AsyncClient, task: str, text: str, options: argparse.Namespace, window: Window) -> None:
    parameters = {"max_new_tokens": options.new_tokens, "ignore_eos": True}
    sent_s = time.perf_counter()
    try:
        answer = await client.post("/generate", json={"task_id": task, "inputs": text, "parameters": parameters})
        answer.raise_for_status()
    except httpx.HTTPError:
        window.errors += 1
        await asyncio.sleep(0.1)  # a server that refuses at once must not be asked in a tight loop
        return
    window.latencies_s.append(time.perf_counter() - sent_s)
    body = answer.json()
    window.tokens += body["usage"]["completion_tokens"]
    window.ttfts_ms.append(body["timing"]["ttft_ms"])


def summary(users: int, windows: list[Window]) -> dict[str, Any]:
    speeds = [window.tokens / window.seconds for window in windows]
    latencies = [seconds for window in windows for seconds in window.latencies_s]
    ttfts = [milliseconds for window in windows for milliseconds in window.ttfts_ms]
    if not latencies:
        raise SystemExit(f"with {users} users no request was answered")
    return {
        "users": users,
        "requests_per_s": statistics.median(len(window.latencies_s) / window.seconds for window in windows),
        "tokens_per_s": statistics.median(speeds),
        "spread": (max(speeds) - min(speeds)) / statistics.median(speeds),
        "latency_p50_s": percentile(latencies, 50),
        "latency_p95_s": percentile(latencies, 95),
        "latency_p99_s": percentile(latencies, 99),
        "ttft_p50_ms": percentile(ttfts, 50),
        "ttft_p95_ms": percentile(ttfts, 95),
        "errors": sum(window.errors for window in windows),
    }


def percentile(values: list[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


if __name__ == "__main__":
    main()
