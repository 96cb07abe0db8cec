"""Examples shown in the prompt: the baseline that learns nothing and reads its examples every time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from server.training.examples import Example
from server.training.prompts import encode_prompt, render_prompt


def order_demonstrations(examples: Sequence[Example], seed: int) -> list[tuple[str, str]]:
    """The examples as (input, preferred answer), in a seeded order."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    return [(examples[i].input, examples[i].outputs[0]) for i in order]


def fit_demonstrations(
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: str,
    instruction: str,
    text: str,
    demonstrations: Sequence[tuple[str, str]],
    max_tokens: int,
) -> tuple[list[int], int]:
    """(the prompt's token ids, how many demonstrations are in it): the most first ones that fit `max_tokens`.

    Without any the prompt may still be longer than `max_tokens`.
    """

    def encode(count: int) -> list[int]:
        return encode_prompt(tokenizer, render_prompt(prompt_format, instruction, text, demonstrations[:count]))

    # Every demonstration makes the prompt longer, so that the number that fits can be bisected.
    counts = range(1, len(demonstrations) + 1)
    fitting = bisect_right(counts, max_tokens, key=lambda count: len(encode(count)))
    return encode(fitting), fitting
