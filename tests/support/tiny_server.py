"""A whole server on a tiny random model: the model's files, an inventory over it, and uvicorn in a thread."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import httpx
import torch
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from server.adapters.injection import linear_sizes
from server.adapters.inventory import Inventory, InventoryTask
from server.app import create_app
from server.backbone import Backbone, load_backbone
from server.inventories import import_inventory
from server.runtime import Runtime
from server.settings import Settings

CONTEXT = 256
TASKS = ("capital", "rhyme")


def write_tiny_model(folder: Path, seed: int = 0, context: int = CONTEXT) -> None:
    """A random Llama whose tokens are bytes, in the files that `load_backbone` reads."""
    disable_progress_bar()
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
        max_position_embeddings=context,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def random_inventory(backbone: Backbone, *, num_heads: int = 4, seed: int = 0) -> Inventory:
    """K = 3 skills, large enough that every task answers differently."""
    generator = torch.Generator().manual_seed(seed)
    sizes = linear_sizes(backbone.model)
    num_skills, rank = 3, 2

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.5

    return Inventory(
        A={n: draw(num_heads, num_skills, d_in // num_heads, rank) for n, (d_in, _) in sizes.items()},
        B={n: draw(num_heads, num_skills, rank, d_out // num_heads) for n, (_, d_out) in sizes.items()},
        alpha=2.0,
        backbone_fingerprint=backbone.fingerprint,
        backbone_name=backbone.name,
        prompt_format="definition-input-output",
        routings={task: draw(len(sizes), num_heads, num_skills) * 8 for task in TASKS},
        tasks={task: InventoryTask(instruction=f"Do {task}.", licence="MIT") for task in TASKS},
    )


def import_tiny(runtime: Runtime) -> None:
    """Import the inventories `tiny` (h = 4, with the tasks of `TASKS`) and `flat` (h = 1, without tasks)."""
    backbone = load_backbone(runtime.settings.backbone, runtime.settings.data_dir)
    sizes = linear_sizes(backbone.model)
    import_inventory(runtime.store, "tiny", random_inventory(backbone).to_bytes(), backbone, sizes)
    flat = random_inventory(backbone, num_heads=1, seed=1)
    import_inventory(runtime.store, "flat", flat.to_bytes(), backbone, sizes, skip_tasks=TASKS)


class LiveServer:
    """A runtime and its application behind uvicorn in a thread."""

    def __init__(self, settings: Settings, *, tasks: bool) -> None:
        self.runtime = Runtime.open(settings)
        if tasks:
            import_tiny(self.runtime)
        config = uvicorn.Config(create_app(self.runtime), port=0, log_config=None, access_log=False, lifespan="on")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
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
