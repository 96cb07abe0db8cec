"""8-bit weights on the bundled backbone: the engine against the quantised model's own forward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from server.adapters.adapted_linear import AddedMix
from server.adapters.assembly import Adapter, assemble
from server.adapters.injection import inject
from server.adapters.inventory import Inventory
from server.backbone import BUNDLED_BACKBONE, Backbone, load_backbone
from server.engine.config import AdapterPath, EngineConfig
from server.engine.engine import Engine
from server.engine.request import AdapterHandle, EngineRequest, SamplingParams, TokenOutput
from server.engine.runner import Runner
from server.inventories import BUNDLED_FOLDER
from server.training.prompts import encode_prompt, render_prompt
from tests.support.int8 import needs_int8

NEW_TOKENS = 12
NEAR_TIE = 0.02  # of logits; rounding decides below
QUESTIONS = {
    "task1146_country_capital": "France",
    "task1321_country_continent": "Kenya",
    "task1210_atomic_classification_madeupof": "Head: bread<sep>Tail: flour",
}


@pytest.fixture
def backbone(data_dir: Path) -> Backbone:
    return load_backbone(BUNDLED_BACKBONE, data_dir)


@needs_int8
@pytest.mark.parametrize("path", ["slots", "inventory"])
def test_the_engines_tokens_are_the_quantised_models_own(backbone: Backbone, path: AdapterPath) -> None:
    inventory = Inventory.from_bytes((BUNDLED_FOLDER / "smollm2-135m-mhr.safetensors").read_bytes())
    adapters = {task: assemble(inventory, inventory.routings[task]) for task in QUESTIONS}
    prompts = {
        task: tuple(encode_prompt(backbone.tokenizer, render_prompt(inventory.prompt_format, "Answer.", text)))
        for task, text in QUESTIONS.items()
    }
    context = inject(backbone.model)
    config = EngineConfig(max_batch=4, max_context=128, prefill_chunk=16, quantization="int8", adapter_path=path)
    engine = Engine(Runner(backbone.model, context, config), config, frozenset())
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    for task, prompt in prompts.items():
        engine.add(EngineRequest(task, task, prompt, sampling, AdapterHandle(task, adapters[task])))
    tokens: dict[str, list[int]] = {task: [] for task in prompts}
    while engine.has_work:
        for output in engine.step()[0]:
            if isinstance(output, TokenOutput):
                tokens[output.request_id].append(output.token_id)
    for task, prompt in prompts.items():
        with context.use(OneAdapter(adapters[task])), torch.inference_mode():
            logits = backbone.model(torch.tensor([prompt + tuple(tokens[task])]), use_cache=False).logits[0]
        at_places = logits[len(prompt) - 1 : -1]  # (NEW_TOKENS, vocabulary)
        chosen = at_places.gather(1, torch.tensor(tokens[task])[:, None])[:, 0]
        assert (at_places.amax(1) - chosen <= NEAR_TIE).all(), task
        assert at_places[0].argmax() == tokens[task][0], task


class OneAdapter(AddedMix):
    """One adapter for all rows, by its definition."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter

    def add(self, linear: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        weights = self._adapter.weights[linear]
        return y + self._adapter.scaling * (x @ weights.A @ weights.B)
