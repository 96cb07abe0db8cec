"""The load, in a process of its own: sends a plan of requests over plain sockets and says when what came back.

Run as a script, with a plan as JSON on standard input, `{"host", "port", "clients", "requests": […]}`, and
the answers as JSON on standard output. With `clients`, so many send one request after another; without, every request
goes at its own `at_s`, or once the streams before it have run so far. Only the standard library and no HTTP package,
so that the load costs the measured server little of the processor that both share. All times are seconds of the
system's monotonic clock.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Request:
    """One POST. `at_s` counts from the plan's start; None where a closed loop sends it in its turn.

    With `after_tokens` it goes when every request without one has had so many `token` events, or has ended.
    """

    path: str
    body: dict[str, Any]
    at_s: float | None = None
    after_tokens: int = 0


@dataclass(frozen=True)
class Answer:
    """What came back. `token_s` are the arrivals of a stream's `token` events; `body` is the answer's JSON."""

    sent_s: float
    done_s: float
    status: int
    body: dict[str, Any]
    token_s: list[float]


def send(url: str, requests: Sequence[Request], clients: int | None = None, timeout_s: float = 600) -> list[Answer]:
    """Send the requests from a process of its own; the answers in their order. Raises SystemExit for a refused one."""
    address = urlsplit(url)
    plan = {"host": address.hostname, "port": address.port, "clients": clients, "requests": list(map(asdict, requests))}
    process = subprocess.run(
        [sys.executable, "-S", str(Path(__file__).resolve())],
        input=json.dumps(plan),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=timeout_s,
    )
    answers = [Answer(**answer) for answer in json.loads(process.stdout)]
    for answer in answers:
        if answer.status >= 300 or "error" in answer.body:
            raise SystemExit(f"{url} refused a request with status {answer.status}: {answer.body}")
    return answers


class Stream:
    """A request's `token` events as they come, and whether there were so many, or none will come any more."""

    def __init__(self, enough: int) -> None:
        self.token_s: list[float] = []
        self.far_enough = asyncio.Event()
        self._enough = enough

    def add_token(self) -> None:
        self.token_s.append(time.monotonic())
        if len(self.token_s) == self._enough:
            self.far_enough.set()


async def run(plan: dict[str, Any]) -> list[Answer]:
    host, port, requests = plan["host"], plan["port"], [Request(**request) for request in plan["requests"]]
    answers: dict[int, Answer] = {}
    waiting = iter(list(enumerate(requests)))
    streams = [Stream(max(r.after_tokens for r in requests)) for _ in requests]
    start_s = time.monotonic()

    async def closed() -> None:
        for number, request in waiting:
            answers[number] = await ask(host, port, request, streams[number])

    async def at_its_time(number: int, request: Request) -> None:
        await asyncio.sleep(max(0.0, start_s + (request.at_s or 0.0) - time.monotonic()))
        if request.after_tokens:
            before = [stream for stream, r in zip(streams, requests, strict=True) if not r.after_tokens]
            await asyncio.gather(*(stream.far_enough.wait() for stream in before))
        answers[number] = await ask(host, port, request, streams[number])

    if plan["clients"]:
        await asyncio.gather(*(closed() for _ in range(plan["clients"])))
    else:
        await asyncio.gather(*(at_its_time(number, request) for number, request in enumerate(requests)))
    return [answers[number] for number in range(len(requests))]


async def ask(host: str, port: int, request: Request, stream: Stream) -> Answer:
    """One request on a connection of its own; its tokens are told to `stream` as they come."""
    reader, writer = await asyncio.open_connection(host, port)
    payload = json.dumps(request.body).encode()
    head = (
        f"POST {request.path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    )
    sent_s = time.monotonic()
    writer.write(head.encode() + payload)
    status = int((await reader.readline()).split()[1])
    headers = await read_headers(reader)
    data, events = b"", headers.get("content-type", "").startswith("text/event-stream")
    async for piece in read_pieces(reader, headers):
        data += piece
        if events:
            *whole, data = data.split(b"\n\n")
            for event in whole:
                if b"event: token" in event:
                    stream.add_token()
                elif b"data:" in event:
                    last = event
    done_s = time.monotonic()
    stream.far_enough.set()
    writer.close()
    text = last.partition(b"data:")[2] if events else data
    return Answer(sent_s, done_s, status, json.loads(text), stream.token_s)


async def read_headers(reader: asyncio.StreamReader) -> dict[str, str]:
    """Header fields up to the empty line, names in lower case."""
    headers = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip()
    return headers


async def read_pieces(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """The body as it comes: chunked, of a known length, or up to the connection's end."""
    if headers.get("transfer-encoding") == "chunked":
        while size := int((await reader.readline()).split(b";")[0], 16):
            yield await reader.readexactly(size)
            await reader.readline()
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        yield await reader.read()


if __name__ == "__main__":
    print(json.dumps([asdict(answer) for answer in asyncio.run(run(json.load(sys.stdin)))]))
