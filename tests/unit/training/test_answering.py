from __future__ import annotations

import pytest
import torch

from server.adapters.assembly import Adapter, assemble
from server.adapters.inventory import Inventory
from server.backbone import Backbone
from server.errors import TooLarge
from server.training.answering import Answerer
from server.training.prompts import encode_answer, encode_prompt

NO_MARK = "\0"


@pytest.fixture
def adapter(inventory: Inventory) -> Adapter:
    return assemble(inventory, next(iter(inventory.routings.values())))


def _prompts(backbone: Backbone, *texts: str) -> list[tuple[int, ...]]:
    return [tuple(encode_prompt(backbone.tokenizer, text)) for text in texts]


def _greedy(backbone: Backbone, prompt: tuple[int, ...], tokens: int) -> str:
    """With the model's own forward pass, one token at a time."""
    sequence = list(prompt)
    for _ in range(tokens):
        token = int(backbone.model(torch.tensor([sequence])).logits[0, -1].argmax())
        if token in backbone.eos_token_ids:
            break
        sequence.append(token)
    return str(backbone.tokenizer.decode(sequence[len(prompt) :])).strip()


def test_answers_are_the_models_own_greedy_ones(backbone: Backbone) -> None:
    prompts = _prompts(backbone, "one", "twenty two", "a third prompt")
    answers = Answerer(backbone, 12).generate(prompts, None, NO_MARK)
    assert answers == [_greedy(backbone, prompt, 12) for prompt in prompts]


def test_an_adapter_changes_the_answers_and_leaves_nothing_behind(backbone: Backbone, adapter: Adapter) -> None:
    prompts = _prompts(backbone, "one", "two")
    answerer = Answerer(backbone, 8)
    bare = answerer.generate(prompts, None, NO_MARK)
    assert answerer.generate(prompts, adapter, NO_MARK) != bare
    assert answerer.generate(prompts, None, NO_MARK) == bare


def test_an_answer_ends_where_the_mark_begins(backbone: Backbone) -> None:
    prompts = _prompts(backbone, "one")
    [whole] = Answerer(backbone, 24).generate(prompts, None, NO_MARK)
    mark = whole[5:8]
    assert Answerer(backbone, 24).generate(prompts, None, mark) == [whole.partition(mark)[0].strip()]


def test_the_choice_with_the_highest_mean_log_likelihood_is_ranked_first(backbone: Backbone, adapter: Adapter) -> None:
    choices = ["yes", "no", "a much longer choice", "maybe"]
    prompts = _prompts(backbone, "one", "twenty two", "a third prompt", "x", "y")

    def score(prompt: tuple[int, ...], choice: str) -> float:
        tokens = encode_answer(backbone.tokenizer, choice)
        logits = backbone.model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        return float(logits.log_softmax(-1)[range(len(tokens)), tokens].mean())

    best = [max(choices, key=lambda choice, p=prompt: score(p, choice)) for prompt in prompts]
    answerer = Answerer(backbone, 1)
    assert answerer.rank(prompts, choices, None) == best
    assert len(answerer.rank(prompts, choices, adapter)) == len(prompts)


def test_a_prompt_over_the_context_is_refused(backbone: Backbone) -> None:
    with pytest.raises(TooLarge, match="context"):
        Answerer(backbone, 4).generate([(5,) * (backbone.context_length + 1)], None, NO_MARK)
