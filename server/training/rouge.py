"""How well an answer agrees with its references: ROUGE-L and exact match."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_WORD = re.compile(r"[a-z0-9]+")
_PUNCTUATION = re.compile(r"[^\w\s]")


def rouge_l(answer: str, references: Iterable[str]) -> float:
    """The best F-measure, 0 to 1, of the longest common subsequence of words with any reference.

    Words are runs of letters a-z and digits in lower case, unstemmed, as in the `rouge-score` package.
    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3.
    """
    words = _WORD.findall(answer.lower())
    return max(_f_measure(words, _WORD.findall(reference.lower())) for reference in references)


def exact_match(answer: str, references: Iterable[str]) -> bool:
    """Whether the answer is one of the references, apart from case, punctuation and white space."""
    return _plain(answer) in map(_plain, references)


def _plain(text: str) -> str:
    return " ".join(_PUNCTUATION.sub("", text.lower()).split())


def _f_measure(answer: Sequence[str], reference: Sequence[str]) -> float:
    common = _longest_common_subsequence(answer, reference)
    return 2 * common / (len(answer) + len(reference)) if common else 0.0


def _longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for i, other in enumerate(b, 1):
            diagonal, row[i] = row[i], diagonal + 1 if word == other else max(row[i], row[i - 1])
    return row[-1]
