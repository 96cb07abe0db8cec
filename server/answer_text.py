"""From token ids to text while they come in: partial characters wait, and so does what may become a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# A character has at most four bytes; after this many tokens without one, the bytes are simply not UTF-8.
_MAX_PENDING_TOKENS = 8
_REPLACEMENT = "�"


class Detokenizer:
    """Text of token ids, piece by piece. Special tokens have no text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # Tokens before `_context` are forgotten; those up to `_shown` are handed out, and give the later ones
        # their context, since some tokenizers drop the space of a first word.
        self._context = 0
        self._shown = 0

    def push(self, token_id: int) -> str:
        """The text that became certain with this token."""
        self._ids.append(token_id)
        text = self._pending()
        if text.endswith(_REPLACEMENT) and len(self._ids) - self._shown < _MAX_PENDING_TOKENS:
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return text

    def flush(self) -> str:
        """The rest, when no token follows."""
        text = self._pending()
        self._context = self._shown = len(self._ids)
        return text

    def _pending(self) -> str:
        shown = self._decode(self._ids[self._context : self._shown])
        return self._decode(self._ids[self._context :])[len(shown) :]

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


class StopStrings:
    """Finds the first stop string in a text that comes in pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is certain to stand before any stop string, whether one was met)."""
        text = self._held + text
        places = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if places:
            self._held = ""
            return text[: min(places)], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back, when no text follows."""
        held, self._held = self._held, ""
        return held


class AnswerText:
    """The text of one answer while its tokens come in.

    `answers_prompt` says that the prompt was rendered, so that the one space between it and the answer is dropped.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], *, min_tokens: int, answers_prompt: bool
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(stops)
        self._min_tokens = min_tokens
        self._drop_space = answers_prompt
        self._num_tokens = 0
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text to hand out after this token; sets `stopped` when a stop string was met."""
        self._num_tokens += 1
        text = self._trim(self._detokenizer.push(token_id))
        if self._num_tokens > self._min_tokens:
            text, self.stopped = self._stops.push(text)
        self.text += text
        return text

    def finish(self) -> str:
        """The text still held back, when no token follows."""
        if self.stopped:
            return ""
        text, self.stopped = self._stops.push(self._trim(self._detokenizer.flush()))
        text += self._stops.flush()
        self.text += text
        return text

    def _trim(self, text: str) -> str:
        if self._drop_space and text:
            self._drop_space = False
            return text.removeprefix(" ")
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
