from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from server.training.rouge import exact_match, rouge_l

_REFERENCE = RougeScorer(["rougeL"], use_stemmer=False)
_WORDS = st.lists(
    st.sampled_from(["a", "B", "cat", "Été", "12", "İ", "K", "_", "—", "日本", "\n", "e\u0301"]), max_size=12
)
_TEXT = st.one_of(_WORDS.map(" ".join), _WORDS.map("".join), st.text(alphabet="aAbB 12.,-é\n", max_size=30), st.text())


@settings(deadline=None, max_examples=500, derandomize=True, database=None)
@given(_TEXT, st.lists(_TEXT, min_size=1, max_size=4))
@example("", [""])
@example("Ångström K", ["angstrom k", "ngstr m K"])
def test_equals_the_rouge_score_package(answer: str, references: list[str]) -> None:
    theirs = _REFERENCE.score_multi(references, answer)["rougeL"].fmeasure
    assert rouge_l(answer, references) == pytest.approx(theirs)


def test_the_best_reference_counts() -> None:
    assert rouge_l("the cat sat", ["a dog", "the cat sat down"]) == pytest.approx(6 / 7)


@pytest.mark.parametrize(
    ("answer", "matches"),
    [("Yes!", True), (" yes ", True), ("yes,  it is", True), ("no", False), ("", False), ("yes it", False)],
)
def test_an_exact_match_looks_past_case_punctuation_and_space(answer: str, matches: bool) -> None:
    assert exact_match(answer, ["yes", "Yes it is."]) is matches
