"""Answers of one adapter to many prompts through the engine: generated greedily, or ranked among choices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from server.adapters.assembly import Adapter
from server.adapters.injection import inject
from server.backbone import Backbone
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.request import AdapterHandle, EngineRequest, FinishOutput, Output, SamplingParams, TokenOutput
from server.engine.runner import Runner
from server.training.prompts import encode_answer

_KEY = "evaluated"  # the one adapter of a call
_MARK_TOKENS = 16  # the last tokens of an answer, in which the end mark is looked for
_CPU_BATCH, _CPU_CHUNK = 32, 512
_GPU_BATCH, _GPU_CHUNK = 128, 8192
_GPU_CACHED_TOKENS = 65_536  # most keys and values to hold at once


class Answerer:
    """Answers prompts of token ids. The engine is made anew for every call, no larger than its prompts need."""

    def __init__(self, backbone: Backbone, max_new_tokens: int) -> None:
        self._backbone = backbone
        self._tokenizer = backbone.tokenizer
        self._max_new_tokens = max_new_tokens

    def generate(self, prompts: Sequence[tuple[int, ...]], adapter: Adapter | None, end_mark: str) -> list[str]:
        """Greedy answers, each up to the end token, `max_new_tokens`, or the text `end_mark`."""
        engine = self._engine(prompts, self._max_new_tokens)
        sampling = SamplingParams(max_new_tokens=self._max_new_tokens)
        for number, prompt in enumerate(prompts):
            engine.add(EngineRequest(str(number), _KEY, prompt, sampling, _handle(adapter)))
        generated: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
        for output in _run(engine):
            if not isinstance(output, TokenOutput):
                continue
            tokens = generated[output.request_id]
            tokens.append(output.token_id)
            if end_mark in self._text(tokens[-_MARK_TOKENS:]):
                engine.abort(output.request_id)
        return [self._text(tokens).partition(end_mark)[0].strip() for tokens in generated.values()]

    def rank(self, prompts: Sequence[tuple[int, ...]], choices: Sequence[str], adapter: Adapter | None) -> list[str]:
        """For each prompt the choice whose tokens have the highest mean log-likelihood; the first of equals.

        Source of the score: Brown et al. 2020 (arXiv 2005.14165), section 2.4.
        """
        encoded = [tuple(encode_answer(self._tokenizer, choice)) for choice in choices]
        engine = self._engine(prompts, max(map(len, encoded)))
        for number, prompt in enumerate(prompts):
            for place, tokens in enumerate(encoded):
                engine.add(
                    EngineRequest(f"{number}/{place}", _KEY, prompt, adapter=_handle(adapter), score_token_ids=tokens)
                )
        scores: dict[str, float] = {}
        for output in _run(engine):
            if isinstance(output, FinishOutput):
                scores[output.request_id] = sum(output.token_logprobs) / len(output.token_logprobs)
        rows = [[scores[f"{number}/{place}"] for place in range(len(choices))] for number in range(len(prompts))]
        return [choices[row.index(max(row))] for row in rows]

    def _engine(self, prompts: Sequence[tuple[int, ...]], answer_tokens: int) -> Engine:
        backbone = self._backbone
        context = min(max(map(len, prompts)) + answer_tokens, backbone.context_length)
        on_cpu = backbone.device.type == "cpu"
        batch = _CPU_BATCH if on_cpu else max(1, min(_GPU_BATCH, _GPU_CACHED_TOKENS // context))
        config = EngineConfig(
            max_batch=batch,
            max_context=context,
            max_queue=1_000_000,
            prefill_chunk=_CPU_CHUNK if on_cpu else _GPU_CHUNK,
            busy_prefill_chunk=None,  # nobody waits for the next token of an answer that is already running
        )
        return Engine(Runner(backbone.model, inject(backbone.model), config), config, backbone.eos_token_ids)

    def _text(self, tokens: Sequence[int]) -> str:
        eos = self._backbone.eos_token_ids
        return str(self._tokenizer.decode([token for token in tokens if token not in eos]))


def _handle(adapter: Adapter | None) -> AdapterHandle | None:
    return None if adapter is None else AdapterHandle(_KEY, adapter)


def _run(engine: Engine) -> Iterator[Output]:
    """All outputs until nothing is left to do. Raises the error of a request that failed."""
    while engine.has_work:
        for output in engine.step()[0]:
            if isinstance(output, FinishOutput) and output.error is not None:
                raise output.error
            yield output
