"""A whole server on a tiny random model, over real sockets and without a worker process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from server.adapters.injection import linear_sizes
from server.adapters.inventory import Inventory, InventoryTask
from server.app import create_app
from server.backbone import Backbone, load_backbone
from server.inventories import import_inventory
from server.runtime import Runtime
from server.settings import Settings

CONTEXT = 256


def write_tiny_model(folder: Path, seed: int = 0) -> None:
    """A random Llama whose tokens are bytes, in the files that `load_backbone` reads."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {letter: i + 3 for i, letter in enumerate(alphabet)}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def random_inventory(backbone: Backbone, num_heads: int = 4, num_skills: int = 3, seed: int = 0) -> Inventory:
    """Skills large enough that every task answers differently."""
    generator = torch.Generator().manual_seed(seed)
    sizes = linear_sizes(backbone.model)
    rank = 2

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tasks = ("capital", "rhyme")
    return Inventory(
        A={n: draw(num_heads, num_skills, i // num_heads, rank) for n, (i, _) in sizes.items()},
        B={n: draw(num_heads, num_skills, rank, o // num_heads) for n, (_, o) in sizes.items()},
        alpha=1.0,
        backbone_fingerprint=backbone.fingerprint,
        backbone_name=backbone.name,
        prompt_format="definition-input-output",
        routings={task: draw(len(sizes), num_heads, num_skills) * 4 for task in tasks},
        tasks={task: InventoryTask(instruction=f"Do {task}.", licence="MIT") for task in tasks},
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-model")
    write_tiny_model(folder)
    return folder


class LiveServer:
    """A runtime and its application behind uvicorn in a thread."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        config = uvicorn.Config(create_app(runtime), port=0, log_config=None, access_log=False, lifespan="on")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)

    def start(self) -> None:
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "uvicorn did not start"
            time.sleep(0.005)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def wait_ready(self) -> None:
        deadline = time.monotonic() + 60
        while httpx.get(f"{self.url}/readyz").status_code != 200:
            assert time.monotonic() < deadline, self.runtime.reason
            time.sleep(0.02)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        self.runtime.close()


def import_tiny(runtime: Runtime) -> None:
    """The inventories `tiny` (h = 4, with the tasks `capital` and `rhyme`) and `flat` (h = 1, without tasks)."""
    backbone = load_backbone(runtime.settings.backbone, runtime.settings.data_dir)
    sizes = linear_sizes(backbone.model)
    import_inventory(runtime.store, "tiny", random_inventory(backbone).to_bytes(), backbone, sizes)
    flat = random_inventory(backbone, num_heads=1, seed=1)
    import_inventory(runtime.store, "flat", flat.to_bytes(), backbone, sizes, skip_tasks=list(flat.routings))


@pytest.fixture
def make_server(tiny_model: Path, tmp_path: Path) -> Iterator[Callable[..., LiveServer]]:
    """Start a server with any settings; it is ready unless `wait=False`, and empty unless `tasks=True`."""
    running: list[LiveServer] = []

    def make(*, wait: bool = True, tasks: bool = False, **settings: object) -> LiveServer:
        values = {"data_dir": tmp_path / "data", "backbone": str(tiny_model), "worker": False, "threads": 1}
        inventory = {"inventory": "tiny"} if tasks else {}
        live = LiveServer(Runtime.open(Settings(**{**values, **inventory, **settings})))
        running.append(live)
        if tasks:
            import_tiny(live.runtime)
        live.start()
        if wait:
            live.wait_ready()
        return live

    yield make
    for live in reversed(running):
        live.stop()


@pytest.fixture(scope="session")
def shared_server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One server for all tests that undo what they do."""
    settings = Settings(
        data_dir=tmp_path_factory.mktemp("data"), backbone=str(tiny_model), worker=False, threads=1, inventory="tiny"
    )
    live = LiveServer(Runtime.open(settings))
    import_tiny(live.runtime)
    live.start()
    live.wait_ready()
    yield live
    live.stop()


@pytest.fixture
def client(shared_server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=shared_server.url, timeout=60) as opened:
        yield opened
