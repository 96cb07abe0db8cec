from __future__ import annotations

import pytest
import torch
from torch import nn

from server.adapters.injection import linear_sizes
from server.engine.config import EngineConfig
from server.engine.packed_head import PackedHead, pack_head
from tests.unit.engine.driver import CONTEXT, Driver, make_model, random_prompt

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 5, 33])
def test_packed_logits_equal_the_plain_ones(rows: int, bias: bool) -> None:
    head = nn.Linear(24, 101, bias=bias)
    x = torch.randn(1, rows, 24)
    with torch.inference_mode():
        torch.testing.assert_close(PackedHead(head)(x), head(x))


@needs_onednn
def test_the_engine_gives_the_same_tokens_with_the_plain_head() -> None:
    answers = []
    for packed in (True, False):
        driver = Driver(make_model(), EngineConfig(max_batch=4, max_context=CONTEXT, packed_head=packed))
        head = driver.runner._model.get_output_embeddings()
        assert isinstance(head, PackedHead) is packed
        ids = [driver.add(random_prompt(n, 5 + n), adapter=driver.handle(n)) for n in range(6)]
        driver.run()
        answers.append([driver.tokens(i) for i in ids])
    assert answers[0] == answers[1]


@needs_onednn
def test_gradients_still_flow_through_a_packed_head() -> None:
    x = torch.randn(3, 24, requires_grad=True)
    PackedHead(nn.Linear(24, 101).requires_grad_(False))(x).sum().backward()
    assert x.grad is not None


@needs_onednn
def test_a_packed_head_is_still_the_models_head_and_stays_tied_and_unadapted() -> None:
    model = make_model()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    before = linear_sizes(model)
    pack_head(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert linear_sizes(model) == before
    assert "lm_head" not in " ".join(before)
    pack_head(model)
    assert isinstance(model.get_output_embeddings(), PackedHead)


def test_other_types_are_left_alone() -> None:
    model = make_model().to(torch.bfloat16)
    pack_head(model)
    assert type(model.get_output_embeddings()) is nn.Linear
