from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from server.training.rouge import rouge_l

_TEXT = st.text(alphabet="aAbB 12.,-é\n", max_size=30)
_REFERENCE = RougeScorer(["rougeL"], use_stemmer=False)


@settings(deadline=None, max_examples=300, derandomize=True, database=None)
@given(_TEXT, _TEXT)
def test_equals_the_rouge_score_package(answer: str, reference: str) -> None:
    theirs = _REFERENCE.score(reference, answer)["rougeL"].fmeasure
    assert rouge_l(answer, [reference]) == pytest.approx(theirs)


def test_the_best_reference_counts() -> None:
    assert rouge_l("the cat sat", ["a dog", "the cat sat down"]) == pytest.approx(6 / 7)
