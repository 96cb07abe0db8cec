"""What is ours: the server over HTTP, and the engine without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any, Literal

from common import ROOT

from serving.client import Request, send
from serving.data import INVENTORY, task_id
from serving.house import House
from serving.waves import RunWave, Wave, wave_of
from serving.workload import Workload

Quantization = Literal["none", "int8"]
OfflineKind = Literal["engine", "peft-poly", "transformers"]
QUANTIZATIONS: tuple[Quantization, ...] = ("none", "int8")


@dataclass(frozen=True)
class Ours:
    """A server of ours with so many registered tasks. `settings` are pairs of `MHR_*` names and values."""

    quantization: Quantization = "none"
    registered: int = 32
    settings: tuple[tuple[str, str], ...] = ()
    warm_tasks: int = 0  # so many are asked once before anything is timed, so that their adapters are there

    def open(self, house: House) -> RunWave:
        process = house.start_ours(self.registered, {"MHR_QUANTIZATION": self.quantization, **dict(self.settings)})
        if self.warm_tasks:
            prompts = house.prompts(self.warm_tasks, tokens=4)
            send(process.url, [generate(task, p.text, 1) for task, p in enumerate(prompts)], clients=32)

        def run(workload: Workload, wave: int) -> Wave:
            prompts = house.prompts(workload.requests)
            requests = [
                generate(task, prompt.text, house.options.new_tokens, workload.stream, at_s)
                for task, prompt, at_s in zip(
                    workload.draw_tasks(wave), prompts, workload.draw_arrivals(wave), strict=True
                )
            ]
            answers = send(process.url, requests, None if workload.rate_per_s else workload.clients)
            return wave_of(answers, house.options.prompt_tokens, house.options.new_tokens)

        return run


def generate(task: int | None, text: str, new_tokens: int, stream: bool = False, at_s: float | None = None) -> Request:
    """A request to our server that goes on after an end token, so that every answer is as long as asked."""
    body = {
        "task_id": "base" if task is None else task_id(task),
        "inputs": text,
        "raw_prompt": True,
        "stream": stream,
        "parameters": {"max_new_tokens": new_tokens, "ignore_eos": True},
    }
    return Request("/generate", body, at_s)


@dataclass(frozen=True)
class Offline:
    """A process that answers a wave as one batch, without HTTP: our engine, or a peer on the same tasks."""

    kind: OfflineKind
    quantization: Quantization = "none"
    registered: int = 32

    def open(self, house: House) -> RunWave:
        options = {
            "kind": self.kind,
            "quantization": self.quantization,
            "backbone": house.options.backbone,
            "data-dir": house.data_dir(self.registered),
            "inventory": INVENTORY,
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "serving.offline", *(f"--{name}={value}" for name, value in options.items())],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout
        house.ending(lambda: end(process))

        def run(workload: Workload, wave: int) -> Wave:
            prompts = [prompt.token_ids for prompt in house.prompts(workload.requests)]
            work = {"prompts": prompts, "tasks": workload.draw_tasks(wave), "new_tokens": house.options.new_tokens}
            return Wave(exchange(stdin, stdout, work)["seconds"], workload.requests * house.options.new_tokens)

        return run


def end(process: subprocess.Popen[str]) -> None:
    """End a process and close its pipes."""
    process.terminate()
    with suppress(BrokenPipeError), process:
        pass


def exchange(stdin: IO[str], stdout: IO[str], work: dict[str, Any]) -> dict[str, Any]:
    """One line of JSON to a process and one back."""
    with suppress(BrokenPipeError):
        print(json.dumps(work), file=stdin, flush=True)
    line = stdout.readline()
    if not line:
        raise SystemExit("a process without HTTP ended early; its words are above")
    answer: dict[str, Any] = json.loads(line)
    return answer
