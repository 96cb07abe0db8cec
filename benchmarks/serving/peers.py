"""Servers of others on the same work: vLLM with one LoRA per request, and llama.cpp's server.

Each is a command from the benchmark's command line; the environment (preloaded libraries, threads) is the caller's.
"""

from __future__ import annotations

import io
import shlex
import tarfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.client import Answer, Request, send
from serving.data import task_id
from serving.house import House
from serving.process import ServerProcess
from serving.waves import RunWave, Wave, wave_of
from serving.workload import Workload

_BARE_MODEL = "bare"


@dataclass(frozen=True)
class VLLM:
    """`vllm serve` on the same backbone, with as many of our tasks, exported as PEFT LoRAs, as its slots hold."""

    command: str  # the executable, with leading arguments if it needs some
    loras: int = 32

    def open(self, house: House) -> RunWave:
        folder = house.folder / "exports"
        exported = export_tasks(house, self.loras, folder)
        command = [
            *shlex.split(self.command),
            *("serve", str(house.model_folder), "--host", "127.0.0.1", "--port", "{port}"),
            *("--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "32"),
            *("--served-model-name", _BARE_MODEL, "--no-enable-prefix-caching"),
            *("--enable-lora", "--max-loras", str(self.loras), "--max-lora-rank", str(house.options.rank)),
            *("--lora-modules", *(f"{task}={path}" for task, path in exported.items())),
        ]
        process = ServerProcess(command, {}, "/health", house.folder / "vllm.log")
        house.ending(process.stop)

        def run(workload: Workload, wave: int) -> Wave:
            requests = [
                completion(_BARE_MODEL if task is None else task_id(task), prompt.token_ids, house.options.new_tokens)
                for task, prompt in zip(workload.draw_tasks(wave), house.prompts(workload.requests), strict=True)
            ]
            answers = send(process.url, requests, workload.clients)
            return wave_of(answers, house.options.prompt_tokens, house.options.new_tokens)

        return run


def completion(model: str, token_ids: tuple[int, ...], new_tokens: int) -> Request:
    """A request of the OpenAI completions API; `ignore_eos` is vLLM's extension."""
    body = {"model": model, "prompt": token_ids, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    return Request("/v1/completions", body)


def export_tasks(house: House, count: int, folder: Path) -> dict[str, Path]:
    """{task: directory of its PEFT LoRA}, written by our server's export."""
    server = house.start_ours(count, {})
    exported = {}
    for number in range(count):
        with urllib.request.urlopen(f"{server.url}/tasks/{task_id(number)}/export") as answer:
            content = io.BytesIO(answer.read())
        with tarfile.open(fileobj=content) as archive:
            archive.extractall(folder, filter="data")
            exported[task_id(number)] = folder / archive.getnames()[0].split("/")[0]
    server.stop()
    return exported


@dataclass(frozen=True)
class LlamaServer:
    """llama.cpp's server, started with a whole command line that holds `{port}` and chooses model and LoRA."""

    command: str

    def open(self, house: House) -> RunWave:
        process = ServerProcess(shlex.split(self.command), {}, "/health", house.folder / "llama.log")
        house.ending(process.stop)

        def run(workload: Workload, wave: int) -> Wave:
            prompts = house.prompts(workload.requests)
            requests = [
                Request(
                    "/completion",
                    {
                        "prompt": prompt.token_ids,
                        "n_predict": house.options.new_tokens,
                        "temperature": 0,
                        "ignore_eos": True,
                        "cache_prompt": False,
                    },
                )
                for prompt in prompts
            ]
            answers = [as_usage(answer) for answer in send(process.url, requests, workload.clients)]
            return wave_of(answers, house.options.prompt_tokens, house.options.new_tokens)

        return run


def as_usage(answer: Answer) -> Answer:
    """llama.cpp's counts under the names of the others."""
    body: dict[str, Any] = {
        "usage": {
            "prompt_tokens": answer.body["tokens_evaluated"],
            "completion_tokens": answer.body["tokens_predicted"],
        }
    }
    return Answer(answer.sent_s, answer.done_s, answer.status, body, answer.token_s)
